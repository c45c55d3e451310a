"""Statistics of tiny transformers models, against a loop over examples and tokens."""

import pytest
import torch

from mergeme_ext.integrations.statistics import (
    causal_log_likelihood,
    collect_fisher,
    collect_grams,
)
from mergeme_ext.io import CheckpointSource
from mergeme_ext.merging import get

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}


def llama(seed=0, dtype=torch.float32, **more):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **more)).to(dtype)


def make_batches(lengths=((9, 5), (7,)), seed=3):
    """Batches of examples of these lengths, padded to the left."""
    g = torch.Generator().manual_seed(seed)
    batches = []
    for row in lengths:
        ids = torch.zeros(len(row), max(row), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, n in enumerate(row):
            ids[i, -n:] = torch.randint(1, 32, (n,), generator=g)
            mask[i, -n:] = 1
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def examples_of(batches):
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            yield ids[mask.bool()][None]


def read(folder):
    source = CheckpointSource(folder)
    return {name: source.tensor(name) for name in source.names}


def fisher_by_hand(model, batches, draw=None):
    squares = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in model.named_parameters()}
    count = 0
    for ids in examples_of(batches):
        model.zero_grad()
        logs = model(input_ids=ids).logits[0].log_softmax(-1)
        targets = ids[0, 1:].tolist() if draw is None else draw[count]
        sum(logs[t, target] for t, target in enumerate(targets)).backward()
        for name, p in model.named_parameters():
            squares[name] += p.grad.double() ** 2
        count += 1
    model.zero_grad()
    return {name: s / count for name, s in squares.items()}


def assert_near(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].double() - value).abs().max()
        assert error <= 1e-4 * value.abs().max(), name


@pytest.mark.parametrize("tied", [False, True])
def test_fisher_squares_per_example(tmp_path, tied):
    model, batches = llama(tie_word_embeddings=tied), make_batches()
    assert collect_fisher(model, batches, tmp_path / "f", labels="data") == 3
    found = read(tmp_path / "f")
    assert_near(found, fisher_by_hand(model, batches))
    assert ("lm_head.weight" in found) is not tied
    assert all(p.grad is None for p in model.parameters())


def test_fisher_draws_labels_from_the_model(tmp_path):
    model, batches = llama(), make_batches()
    collect_fisher(model, batches, tmp_path / "f", seed=7)
    generator = torch.Generator().manual_seed(7)
    draws = []
    for ids in examples_of(batches):
        with torch.no_grad():
            chances = model(input_ids=ids).logits[0, :-1].log_softmax(-1).exp()
        draws.append(torch.multinomial(chances, 1, generator=generator)[:, 0].tolist())
    assert_near(read(tmp_path / "f"), fisher_by_hand(model, batches, draws))
    collect_fisher(model, batches, tmp_path / "again", seed=7)
    first, again = read(tmp_path / "f"), read(tmp_path / "again")
    assert all(torch.equal(first[name], again[name]) for name in first)
    collect_fisher(model, batches, tmp_path / "other", seed=8)
    assert not torch.equal(read(tmp_path / "other")["lm_head.weight"], first["lm_head.weight"])


def test_labels_may_leave_out_tokens():
    model = llama()
    ids = torch.tensor([[3, 4, 5, 6]])
    labels = torch.tensor([[-100, -100, 5, -100]])
    logs = model(input_ids=ids).logits[0].log_softmax(-1)
    value = causal_log_likelihood(model, {"input_ids": ids, "labels": labels})
    torch.testing.assert_close(value, logs[1, 5])
    none = causal_log_likelihood(model, {"input_ids": ids, "labels": labels.fill_(-100)})
    assert none == 0


def test_grams_are_means_over_tokens(tmp_path):
    model, batches = llama(), make_batches()
    assert collect_grams(model, batches, tmp_path / "g") == 3
    found = read(tmp_path / "g")
    inputs = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            rows = inputs.setdefault(f"{name}.weight", [])
            layer.register_forward_hook(lambda _, args, out, rows=rows: rows.append(args[0][0]))
    with torch.no_grad():
        for ids in examples_of(batches):
            model(input_ids=ids)
    expected = {}
    for name, rows in inputs.items():
        x = torch.cat(rows).double()
        assert len(x) == 9 + 5 + 7
        expected[name] = x.t() @ x / len(x)
    assert_near(found, expected)


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2))


def test_experts_see_the_tokens_routed_to_them(tmp_path):
    model, batches = mixtral(), make_batches(((3, 2),))
    model.save_pretrained(tmp_path / "m")
    collect_grams(model, batches, tmp_path / "g")
    seen = {}
    for layer, block in enumerate(model.model.layers):
        block.mlp.experts.register_forward_hook(
            lambda _, args, out, layer=layer: seen.setdefault(layer, []).append(args)
        )
    with torch.no_grad():
        for ids in examples_of(batches):
            model(input_ids=ids)
    stored, found, expected = read(tmp_path / "m"), read(tmp_path / "g"), {}
    for layer, expert in ((layer, e) for layer in range(2) for e in range(8)):
        rows = [
            x for xs, ids, _ in seen[layer] for x, k in zip(xs, ids, strict=True) if expert in k
        ]
        if not rows:
            continue
        stem = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
        w1, w3 = (stored[f"{stem}.{w}.weight"].double() for w in ("w1", "w3"))
        x = torch.stack(rows).double()
        inner = torch.nn.functional.silu(x @ w1.t()) * (x @ w3.t())
        expected[f"{stem}.w1.weight"] = expected[f"{stem}.w3.weight"] = x.t() @ x / len(x)
        expected[f"{stem}.w2.weight"] = inner.t() @ inner / len(x)
    assert 0 < len(expected) < 2 * 8 * 3, "some experts are reached and some are not"
    assert_near({n: g for n, g in found.items() if ".experts." in n}, expected)
    assert found.keys() <= stored.keys()


def test_fishers_of_experts_are_stored_like_their_weights(tmp_path):
    model = mixtral()
    model.save_pretrained(tmp_path / "m")
    collect_fisher(model, make_batches(), tmp_path / "f", labels="data")
    stored, found = read(tmp_path / "m"), read(tmp_path / "f")
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in stored.items()}
    by_hand = fisher_by_hand(model, make_batches())["model.layers.0.mlp.experts.down_proj"]
    for expert in range(8):
        w2 = found[f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight"]
        torch.testing.assert_close(w2.double(), by_hand[expert], rtol=1e-4, atol=1e-9)


def test_a_model_keeps_its_mode_and_hooks(tmp_path):
    model = llama(attention_dropout=0.5)
    model.train()
    model.lm_head.eval()
    for i in range(2):  # dropout would make two runs differ
        collect_grams(model, make_batches(), tmp_path / f"g{i}")
        collect_fisher(model, make_batches(), tmp_path / f"f{i}", labels="data")
    for kind in "gf":
        one, other = read(tmp_path / f"{kind}0"), read(tmp_path / f"{kind}1")
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert model.training and not model.lm_head.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_bfloat16_models_give_float32_statistics(tmp_path):
    model = llama(dtype=torch.bfloat16)
    collect_fisher(model, make_batches(), tmp_path / "f", max_examples=1)
    collect_grams(model, make_batches(), tmp_path / "g", max_examples=1)
    for folder in "fg":
        assert {t.dtype for t in read(tmp_path / folder).values()} == {torch.float32}


def test_another_likelihood(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    batches = [{"x": torch.randn(4, 3), "y": torch.tensor([0, 1, 1, 0])}]

    def likelihood(model, example):
        return model(example["x"]).log_softmax(-1)[0, example["y"]].sum()

    collect_fisher(model, batches, tmp_path / "f", log_likelihood=likelihood)
    expected = torch.zeros(2)
    for x, y in zip(batches[0]["x"], batches[0]["y"], strict=True):
        expected += (torch.eye(2)[y] - model(x).softmax(-1)) ** 2 / 4
    torch.testing.assert_close(read(tmp_path / "f")["0.bias"], expected.detach())


def test_the_methods_take_what_was_collected(tmp_path):
    models, batches = [llama(0), llama(1)], make_batches()
    fishers, grams = [], []
    for i, model in enumerate(models):
        collect_fisher(model, batches, tmp_path / f"f{i}")
        collect_grams(model, batches, tmp_path / f"g{i}")
        fishers.append(read(tmp_path / f"f{i}"))
        grams.append(read(tmp_path / f"g{i}"))
    weights = [dict(model.named_parameters()) for model in models]
    for name in weights[0]:
        tensors = [w[name].detach() for w in weights]
        out = get("fisher")(None, tensors, statistics=[f[name] for f in fishers])
        assert out.shape == tensors[0].shape and out.isfinite().all()
    for name in grams[0]:
        tensors = [w[name].detach() for w in weights]
        out = get("regmean")(None, tensors, statistics=[g[name] for g in grams])
        assert out.isfinite().all() and not torch.allclose(out, sum(tensors) / 2)


def test_refuses(tmp_path):
    model = llama()
    with pytest.raises(ValueError, match="labels to be model or data, got 'x'"):
        collect_fisher(model, [], tmp_path / "f", labels="x")
    for collect in (collect_fisher, collect_grams):
        with pytest.raises(ValueError, match="expected at least one example, got none"):
            collect(model, [], tmp_path / "f")
    collect_grams(model, make_batches(), tmp_path / "f")
    with pytest.raises(FileExistsError):
        collect_grams(model, make_batches(), tmp_path / "f")
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="is not finite"):
        collect_fisher(model, make_batches(), tmp_path / "n", labels="data")
    assert not (tmp_path / "n").exists()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="parameters that require a gradient, got none"):
        collect_fisher(model, make_batches(), tmp_path / "n")

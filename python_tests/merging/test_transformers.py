"""Real round trips: transformers writes the inputs and loads the result."""

import pytest
import torch

from mergeme_ext.io import CheckpointSource
from mergeme_ext.merging import MergeSpec, merge

pytestmark = pytest.mark.slow


def save_llama(folder, seed, *, dtype=torch.float32, tied=False, shard="50GB"):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def load(folder):
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[kind], (kind, report[kind])
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_of_sharded_models_loads(tmp_path, dtype, tied):
    options = {"dtype": dtype, "tied": tied}
    base = save_llama(tmp_path / "base", 0, **options)
    tuned = [save_llama(tmp_path / n, i, **options, shard="20KB") for i, n in enumerate("ab", 1)]
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    source = CheckpointSource(tmp_path / "a")
    state = tuned[0].state_dict()
    assert all(torch.equal(source.tensor(n), state[n]) for n in source.names)

    spec = MergeSpec.of_models(
        "ties", [tmp_path / "a", tmp_path / "b"], base=tmp_path / "base", parameters={"weights": 1}
    )
    merge(spec, tmp_path / "out", max_shard_size="20KB")
    model = load(tmp_path / "out")
    assert model.dtype == dtype
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in base.parameters())
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4).shape == (1, 7)


def test_one_model_merged_alone_is_that_model(tmp_path):
    save_llama(tmp_path / "base", 0)
    tuned = save_llama(tmp_path / "a", 1)
    spec = MergeSpec.of_models(
        "linear", [tmp_path / "a"], base=tmp_path / "base", parameters={"weights": 1}
    )
    merge(spec, tmp_path / "out")
    ids = torch.arange(10)[None]
    assert torch.equal(load(tmp_path / "out")(ids).logits, tuned(ids).logits)


def save_mixed(folder, kind, seed):
    """A small model whose layers differ: in their attention, or by having experts or not."""
    import transformers

    shared = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    if kind == "gemma3_text":
        kinds = ["sliding_attention", "full_attention"] * 2
        config = transformers.Gemma3TextConfig(**shared, layer_types=kinds, sliding_window=4)
    elif kind == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(**shared, **experts, mlp_only_layers=[0, 2])
    else:
        config = transformers.Qwen2MoeConfig(
            **shared, **experts, decoder_sparse_step=2, shared_expert_intermediate_size=16
        )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3_moe", "qwen2_moe"])
def test_stacked_slices_of_unlike_layers_load(tmp_path, monkeypatch, kind):
    """Layers 0, 1, 2 of one model and 1, 2, 3 of another, run one after the other."""
    monkeypatch.chdir(tmp_path)
    a, b = (save_mixed(tmp_path / name, kind, seed) for seed, name in enumerate("ab"))
    (tmp_path / "r.yaml").write_text(
        "merge_method: passthrough\nslices:\n"
        "  - sources: [{model: a, layer_range: [0, 3]}]\n"
        "  - sources: [{model: b, layer_range: [1, 4]}]\n"
    )
    merge("r.yaml", "out")
    out = load("out").eval()
    originals = [a.model.layers[i] for i in range(3)] + [b.model.layers[i] for i in (1, 2, 3)]
    assert len(out.model.layers) == 6
    for layer, original in zip(out.model.layers, originals, strict=True):
        assert type(layer.mlp) is type(original.mlp)
        state, expected = layer.state_dict(), original.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[n], expected[n]) for n in state)
        assert getattr(layer.self_attn, "sliding_window", None) == getattr(
            original.self_attn, "sliding_window", None
        )
    assert torch.equal(out.model.norm.weight, b.model.norm.weight)
    assert torch.equal(out.model.embed_tokens.weight, a.model.embed_tokens.weight)

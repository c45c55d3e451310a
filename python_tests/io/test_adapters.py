import json
import math

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeme_ext.io import AdaptedSource, CheckpointError, CheckpointSource, Stored
from mergeme_ext.io.lora import Adapted, Shifted
from python_tests.references import lora as reference
from python_tests.support.checkpoints import llama_tensors, save

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
EMBED = "model.embed_tokens"
UNIT = 2.0**-24


def matrices(*shapes, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def lora(module, inputs, outputs, rank=4, seed=0, dtype=torch.float32):
    a, b = matrices((rank, inputs), (outputs, rank), seed=seed, dtype=dtype)
    prefix = f"base_model.model.{module}."
    return {prefix + "lora_A.weight": a, prefix + "lora_B.weight": b}


def save_adapter(folder, tensors, file="adapter_model.safetensors", **settings):
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    if file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        safetensors.torch.save_file(
            {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / file
        )
    return folder


@pytest.fixture
def base(tmp_path):
    return CheckpointSource(save(tmp_path / "base", llama_tensors()))


def everything(operand):
    return operand.rows(0, operand.shape[0])


def assert_close(got, weight, a, b, scale):
    """Within the rounding of r products and their sum, of the scale and of the last addition."""
    wanted = weight.double() + reference.update(a, b, scale)
    terms = a.shape[0] + 3
    bound = terms * UNIT / (1 - terms * UNIT)
    limit = bound * (weight.double().abs() + reference.magnitude_bound(a, b, scale))
    assert got.dtype == torch.float32
    assert ((got.double() - wanted).abs() <= limit).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_adapted_rows(dtype, transposed, rank):
    weight, a, b = matrices((9, 14), (rank, 14), (9, rank), dtype=dtype)
    stored = weight.t().contiguous() if transposed else weight
    operand = Adapted(Stored(stored), Stored(a), Stored(b), 0.3, transposed=transposed)
    assert operand.stored() is None and operand.shape == tuple(stored.shape)
    got = everything(operand)
    assert_close(got.t() if transposed else got, weight, a, b, 0.3)
    operand.prefetch()
    assert torch.equal(everything(operand), got)
    operand.release()
    assert torch.equal(everything(operand), got)
    with pytest.raises(ValueError, match=r"expected a part of \[0, "):
        operand.rows(0, 15)


@given(
    cuts=st.lists(st.integers(0, 70), max_size=6),
    transposed=st.booleans(),
    dora=st.booleans(),
    rank=st.sampled_from([1, 3, 8]),
)
def test_no_bit_depends_on_cuts(cuts, transposed, dora, rank):
    shapes = (
        ((70, 33), (rank, 70), (33, rank)) if transposed else ((70, 33), (rank, 33), (70, rank))
    )
    weight, a, b = matrices(*shapes)
    magnitude = matrices((33 if transposed else 70,), seed=1)[0]

    def fresh():
        return Adapted(
            Stored(weight),
            Stored(a),
            Stored(b),
            1.7,
            transposed=transposed,
            magnitude=Stored(magnitude) if dora else None,
        )

    whole = everything(fresh())
    edges = sorted({0, 70, *cuts})
    parts = [fresh().rows(edges[i], edges[i + 1]) for i in range(len(edges) - 1)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("transposed", [False, True])
def test_dora(transposed):
    weight, a, b, magnitude = matrices((9, 14), (4, 14), (9, 4), (9,))
    stored = weight.t().contiguous() if transposed else weight
    got = everything(
        Adapted(
            Stored(stored),
            Stored(a),
            Stored(b),
            2.0,
            transposed=transposed,
            magnitude=Stored(magnitude),
        )
    )
    wanted = reference.dora(weight, a, b, 2.0, magnitude)
    got = got.t() if transposed else got
    # The bound of the sum, carried through a norm (14 terms of it) and two more roundings.
    terms = 4 + 3
    bound = terms * UNIT * (weight.abs() + reference.magnitude_bound(a, b, 2.0)).double()
    norms = (weight.double() + reference.update(a, b, 2.0)).norm(dim=1)
    factor = (magnitude.double().abs() / norms)[:, None]
    limit = factor * bound + wanted.abs() * (bound.norm(dim=1) / norms + 4 * UNIT)[:, None]
    assert ((got.double() - wanted).abs() <= limit).all()


def test_an_adapter_acts_on_its_modules_alone(tmp_path, base):
    tensors = lora(Q, 16, 16, seed=1) | lora(DOWN, 24, 16, seed=2)
    source = AdaptedSource(base, save_adapter(tmp_path / "ad", tensors, unheard_of={"x": 1}))
    assert source.names == base.names and len(source) == len(base)
    assert source.label == f"{base.label}+{tmp_path / 'ad'}"
    assert source.config == base.config and source.path == base.path
    assert source.dropped == {}
    for name in base.names:
        module = name.removesuffix(".weight")
        weight = base.tensor(name)
        if module not in (Q, DOWN):
            assert source.operand(name).stored() is not None
            assert torch.equal(source.tensor(name), weight)
            assert source.info(name) == base.info(name)
            continue
        a, b = (tensors[f"base_model.model.{module}.lora_{p}.weight"] for p in "AB")
        assert source.operand(name).stored() is None
        assert_close(everything(source.operand(name)), weight, a, b, 8 / 4)
        assert source.bytes_to_read(name) == weight.nbytes + a.nbytes + b.nbytes
        with pytest.raises(CheckpointError, match="is adapted by LoRA, which only a merge applies"):
            source.tensor(name)
    assert Q + ".weight" in source and "x" not in source
    with pytest.raises(CheckpointError, match="has no tensor 'x'"):
        source.info("x")
    source.prefetch(Q + ".weight")
    source.release(Q + ".weight")


def test_half_precision_bases_are_adapted_in_float32(tmp_path):
    base = CheckpointSource(save(tmp_path / "base", llama_tensors(dtype=torch.bfloat16)))
    tensors = lora(Q, 16, 16, dtype=torch.bfloat16)
    source = AdaptedSource(base, save_adapter(tmp_path / "ad", tensors))
    name = Q + ".weight"
    assert source.info(name).dtype == source.operand(name).dtype == torch.float32
    assert source.default_dtype(name) == torch.bfloat16
    a, b = tensors.values()
    assert_close(everything(source.operand(name)), base.tensor(name), a, b, 2.0)


def test_fp8_bases_are_dequantised_first(tmp_path):
    tensors = llama_tensors()
    name = Q + ".weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[name + "_scale_inv"] = torch.full((1, 1), 0.25)
    config = {"quantization_config": {"quant_method": "fp8"}}
    base = CheckpointSource(save(tmp_path / "base", tensors, config))
    adapter = lora(Q, 16, 16)
    source = AdaptedSource(base, save_adapter(tmp_path / "ad", adapter))
    a, b = adapter.values()
    assert_close(everything(source.operand(name)), tensors[name].float() * 0.25, a, b, 2.0)
    assert list(source.dropped) == [name + "_scale_inv"]


@pytest.mark.parametrize(
    "settings, scale",
    [
        ({"use_rslora": True}, 8 / 2),
        ({"lora_alpha": 3.5}, 3.5 / 4),
        ({"alpha_pattern": {"q_proj": 20, "layers.0.self_attn.q_proj": 3}}, 20 / 4),
        ({"alpha_pattern": {"k_proj": 20, r"layers\.\d\.self_attn\.q_proj": 3}}, 3 / 4),
        ({"alpha_pattern": {"proj": 20}}, 8 / 4),  # no whole part of the name
        ({"r": 16, "rank_pattern": {"^model.layers.0.*q_proj": 4}}, 8 / 4),
        ({"r": 16, "rank_pattern": {"q_proj": 4}, "use_rslora": True}, 8 / 2),
    ],
)
def test_scales(tmp_path, base, settings, scale):
    tensors = lora(Q, 16, 16)
    source = AdaptedSource(base, save_adapter(tmp_path / "ad", tensors, **settings))
    name = Q + ".weight"
    assert_close(everything(source.operand(name)), base.tensor(name), *tensors.values(), scale)


def test_an_embedding_is_adapted_the_other_way_round(tmp_path, base):
    a, b = matrices((4, 40), (16, 4))
    prefix = f"base_model.model.{EMBED}."
    tensors = {prefix + "lora_embedding_A": a, prefix + "lora_embedding_B": b}
    source = AdaptedSource(base, save_adapter(tmp_path / "ad", tensors))
    name = EMBED + ".weight"
    got = everything(source.operand(name))
    assert_close(got.t(), base.tensor(name).t(), a, b, 2.0)
    # As PEFT saves it, with the layer below.
    tensors[prefix + "base_layer.weight"] = below = base.tensor(name) + 1
    source = AdaptedSource(base, save_adapter(tmp_path / "with", tensors))
    assert_close(everything(source.operand(name)).t(), below.t(), a, b, 2.0)


def test_gpt2_stores_weights_the_other_way_round(tmp_path):
    shapes = {"h.0.mlp.c_fc": (8, 12), "h.0.attn.c_proj": (8, 8)}  # [in, out]
    weights = {name + ".weight": matrices(shape)[0] for name, shape in shapes.items()}
    base = CheckpointSource(save(tmp_path / "base", weights))
    tensors = lora("h.0.mlp.c_fc", 8, 12) | lora("h.0.attn.c_proj", 8, 8, seed=1)
    source = AdaptedSource(base, save_adapter(tmp_path / "ad", tensors, fan_in_fan_out=True))
    for module in shapes:
        a, b = (tensors[f"base_model.model.{module}.lora_{p}.weight"] for p in "AB")
        weight = weights[module + ".weight"].t()
        assert_close(everything(source.operand(module + ".weight")).t(), weight, a, b, 2.0)
    with pytest.raises(CheckpointError, match=r"fan_in_fan_out is False, which other modules"):
        AdaptedSource(base, save_adapter(tmp_path / "ad", tensors, fan_in_fan_out=False))
    # A weight that is not square speaks for itself.
    del tensors["base_model.model.h.0.attn.c_proj.lora_A.weight"]
    del tensors["base_model.model.h.0.attn.c_proj.lora_B.weight"]
    source = AdaptedSource(base, save_adapter(tmp_path / "ad", tensors, fan_in_fan_out=False))
    a, b = tensors.values()
    weight = weights["h.0.mlp.c_fc.weight"].t()
    assert_close(everything(source.operand("h.0.mlp.c_fc.weight")).t(), weight, a, b, 2.0)


def test_modules_saved_whole_replace_the_base(tmp_path, base):
    head, norm = matrices((40, 16), (16,))
    tensors = {
        "base_model.model.lm_head.weight": head.bfloat16(),
        "base_model.model.model.norm.modules_to_save.weight": norm,
    }
    adapter = save_adapter(tmp_path / "ad", tensors, modules_to_save=["lm_head", "norm"])
    source = AdaptedSource(base, adapter)
    assert torch.equal(source.operand("lm_head.weight").stored(), head.bfloat16())
    assert source.info("lm_head.weight").dtype == torch.bfloat16
    assert source.default_dtype("lm_head.weight") == torch.float32
    assert source.bytes_to_read("lm_head.weight") == 40 * 16 * 2
    assert torch.equal(source.tensor("model.norm.weight"), norm)


def test_a_resized_vocabulary(tmp_path, base):
    head, embedding = matrices((43, 16), (43, 16))
    tensors = {
        "base_model.model.lm_head.weight": head,
        "base_model.model.model.embed_tokens.weight": embedding,
    }
    source = AdaptedSource(base, save_adapter(tmp_path / "ad", tensors))
    assert source.config == base.config | {"vocab_size": 43}
    assert source.info("lm_head.weight").shape == (43, 16)
    assert torch.equal(everything(source.operand(EMBED + ".weight")), embedding)


def test_a_tied_head_saved_along_is_dropped_if_equal(tmp_path):
    base = CheckpointSource(
        save(tmp_path / "base", llama_tensors(head=False), {"tie_word_embeddings": True})
    )
    embedding = matrices((40, 16))[0]
    tensors = {
        "base_model.model.lm_head.weight": embedding,
        "base_model.model.model.embed_tokens.weight": embedding,
    }
    source = AdaptedSource(base, save_adapter(tmp_path / "ad", tensors))
    assert source.dropped == {
        "base_model.model.lm_head.weight": "equal to the embedding, which it is tied to"
    }
    tensors["base_model.model.lm_head.weight"] = embedding + 1
    with pytest.raises(CheckpointError, match=r"lm_head.weight' matches nothing"):
        AdaptedSource(base, save_adapter(tmp_path / "ad", tensors))


def test_lora_bias(tmp_path):
    bias, shift = matrices((16,), (16,))
    base = CheckpointSource(save(tmp_path / "base", llama_tensors() | {Q + ".bias": bias}))
    tensors = lora(Q, 16, 16) | {f"base_model.model.{Q}.lora_B.bias": shift}
    source = AdaptedSource(base, save_adapter(tmp_path / "ad", tensors, lora_bias=True))
    got = everything(source.operand(Q + ".bias"))
    wanted = bias.double() + 2 * shift.double()
    assert torch.equal(got, wanted.float())
    assert source.info(Q + ".bias").dtype == torch.float32
    assert source.bytes_to_read(Q + ".bias") == 128
    operand = Shifted(Stored(bias), Stored(shift), 2.0)
    assert torch.equal(torch.cat([operand.rows(0, 3), operand.rows(3, 16)]), got)
    assert operand.stored() is None and torch.equal(shift, matrices((16,), (16,))[1])
    # Without a bias in the base, there is nothing to add it to.
    plain = CheckpointSource(save(tmp_path / "plain", llama_tensors()))
    with pytest.raises(CheckpointError, match=rf"matches nothing: .* has no tensor '{Q}.bias'"):
        AdaptedSource(plain, tmp_path / "ad")


def test_an_adapter_of_torch_save(tmp_path, base):
    tensors = lora(Q, 16, 16)
    source = AdaptedSource(base, save_adapter(tmp_path / "ad", tensors, "adapter_model.bin"))
    name = Q + ".weight"
    assert_close(everything(source.operand(name)), base.tensor(name), *tensors.values(), 2.0)


def test_names_with_the_adapters_name_in_them(tmp_path, base):
    tensors = {k.replace(".weight", ".default.weight"): v for k, v in lora(Q, 16, 16).items()}
    source = AdaptedSource(base, save_adapter(tmp_path / "ad", tensors))
    assert source.operand(Q + ".weight").stored() is None


GOOD = lora(Q, 16, 16)
PREFIX = f"base_model.model.{Q}."
BAD = {
    "another kind": (GOOD, {"peft_type": "IA3"}, r"expected a LoRA adapter .* got 'IA3'"),
    "fused experts": (GOOD, {"target_parameters": ["mlp.experts.down_proj"]}, "fused experts"),
    "replicated": (GOOD, {"layer_replication": [[0, 2]]}, "layer_replication are not applied"),
    "tokens": (GOOD, {"trainable_token_indices": [1]}, "single rows of the embedding"),
    "activated": (GOOD, {"alora_invocation_tokens": [1]}, "a part of the text only"),
    "pissa": (GOOD, {"init_lora_weights": "pissa_niter_4"}, "changed the base model's weights"),
    "dora and bias": (GOOD, {"use_dora": True, "lora_bias": True}, "use_dora together with lora"),
    "unknown module": (
        lora("model.layers.7.self_attn.q_proj", 16, 16),
        {},
        r"layers.7.self_attn.q_proj.lora_A.weight' matches nothing: .*base has no tensor",
    ),
    "unknown tensor": (
        GOOD | {"base_model.model.score.weight": torch.ones(2)},
        {},
        "'base_model.model.score.weight' matches nothing",
    ),
    "unknown part": (GOOD | {PREFIX + "lora_A.bias": torch.ones(4)}, {}, "lora_A.bias' matches no"),
    "no B": ({PREFIX + "lora_A.weight": torch.ones(4, 16)}, {}, "expected matrices A and B, b is"),
    "twice": (
        GOOD | {PREFIX + "lora_A.default.weight": torch.ones(4, 16)},
        {},
        r"lora_A.* and .*lora_A.* say the same",
    ),
    "another rank": (GOOD, {"r": 8}, r"expected A \[8, 16\] and B \[16, 8\] .* got \[4, 16\]"),
    "no rank": (GOOD, {"r": None}, "expected r as a number of at least 1, got None"),
    "no alpha": (GOOD, {"lora_alpha": "x"}, "expected lora_alpha as a number, got 'x'"),
    "infinite alpha": (GOOD, {"alpha_pattern": {"q_proj": 1e999}}, "Infinity is not JSON"),
    "bad pattern": (GOOD, {"rank_pattern": {"(": 4}}, r"expected a regular expression, got '\('"),
    "slow pattern": (GOOD, {"rank_pattern": {r"(\w+)+x": 4}}, "could take forever to match"),
    "long pattern": (GOOD, {"alpha_pattern": {".*.*.*.*.*x": 4}}, "could take forever to match"),
    "list of patterns": (
        GOOD,
        {"rank_pattern": [4]},
        "expected rank_pattern to map",
    ),
    "another width": (lora(Q, 8, 16), {}, r"expected A \[4, 16\] .* got \[4, 8\]"),
    "convolution": (
        {
            PREFIX + "lora_A.weight": torch.ones(4, 16, 1),
            PREFIX + "lora_B.weight": torch.ones(16, 4),
        },
        {},
        "convolutions are not adapted",
    ),
    "whole numbers": (
        {n: t.to(torch.int32) for n, t in GOOD.items()},
        {},
        "in 16 bits or more, got torch.int32",
    ),
    "dora without magnitude": (GOOD, {"use_dora": True}, "a magnitude vector if and only if"),
    "magnitude without dora": (
        GOOD | {PREFIX + "lora_magnitude_vector": torch.ones(16)},
        {},
        "a magnitude vector if and only if use_dora is set",
    ),
    "short magnitude": (
        GOOD | {PREFIX + "lora_magnitude_vector": torch.ones(15)},
        {"use_dora": True},
        r"lora_magnitude_vector of shape \[16\] .* got \[15\]",
    ),
    "another shape": (
        {"base_model.model.model.norm.weight": torch.ones(15)},
        {},
        r"norm.weight': expected \[16\] as in .*base, got \[15\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses_bad_adapters(tmp_path, base, case):
    tensors, settings, message = BAD[case]
    with pytest.raises(CheckpointError, match=message):
        AdaptedSource(base, save_adapter(tmp_path / "ad", tensors, **settings))


def test_refuses_folders_without_an_adapter(tmp_path, base):
    with pytest.raises(CheckpointError, match=r"expected an adapter's folder with adapter_config"):
        AdaptedSource(base, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match=r"expected adapter_model.safetensors or adapter_mod"):
        AdaptedSource(base, tmp_path)


PEFT = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 3}},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]},
    "trained biases": {"bias": "all"},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding with dora": {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True},
    "head saved whole": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", PEFT)
def test_agrees_with_peft(tmp_path, case):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    settings = {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 8} | PEFT[case]
    settings |= {"init_lora_weights": False, "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 8)
    adapted.save_pretrained(tmp_path / "ad")
    source = AdaptedSource(CheckpointSource(tmp_path / "base"), tmp_path / "ad")
    wanted = adapted.merge_and_unload().state_dict()
    assert set(wanted) == set(source.names)
    changed = 0
    for name, tensor in wanted.items():
        got = everything(source.operand(name))
        scale = tensor.abs().max() + source.base.tensor(name).abs().max()
        # Both round in float32: their norms and sums over at most 40 terms.
        assert (got - tensor).abs().max() <= 64 * UNIT * scale, name
        changed += not torch.equal(tensor, source.base.tensor(name))
    assert changed >= 3 and math.isfinite(sum(t.sum().item() for t in wanted.values()))

import itertools
import json
import math

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeme_ext.io import CheckpointError, CheckpointSource
from python_tests.references import fp8 as reference

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
NAME = "model.layers.0.mlp.up_proj.weight"


def codes(*shape, dtype=E4M3, seed=0):
    """Every finite code may occur."""
    g = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, shape, generator=g, dtype=torch.int16).to(torch.uint8)
    return torch.where(raw.view(dtype).to(torch.float32).isfinite(), raw, 7).view(dtype)


def scales(*shape, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=g) + 0.01).to(dtype)


def save(folder, tensors, config=None):
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def fp8_config(**quantisation):
    quantisation = {"quant_method": "fp8", **quantisation}
    return {"model_type": "x", "torch_dtype": "float16", "quantization_config": quantisation}


def everything(operand):
    return operand.rows(0, operand.shape[0])


@pytest.mark.parametrize("dtype, decode", [(E4M3, reference.e4m3), (E5M2, reference.e5m2)])
def test_every_code_means_what_the_format_says(tmp_path, dtype, decode):
    tensor = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype)
    source = CheckpointSource(save(tmp_path / "m", {"w": tensor}))
    assert source.info("w").dtype == source.operand("w").dtype == torch.float32
    assert source.operand("w").stored() is None
    for byte, got in enumerate(everything(source.operand("w")).tolist()):
        wanted = decode(byte)
        assert got == wanted or (math.isnan(got) and math.isnan(wanted))


# shape of the weight, block, shape of the scale
BLOCKS = {
    "whole blocks": ((4, 6), (2, 3), (2, 2)),
    "ragged rows": ((5, 6), (2, 3), (3, 2)),
    "ragged columns": ((4, 7), (2, 3), (2, 3)),
    "ragged both": ((5, 7), (2, 3), (3, 3)),
    "block larger": ((5, 7), (8, 3), (1, 3)),
    "rows of 32": ((3, 70), (1, 32), (3, 3)),
}


@pytest.mark.parametrize("case", BLOCKS)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_block_scales(tmp_path, case, scale_dtype):
    shape, block, grid = BLOCKS[case]
    weight, scale = codes(*shape), scales(*grid, dtype=scale_dtype)
    folder = save(
        tmp_path / "m",
        {NAME: weight, NAME + "_scale_inv": scale, "other": torch.ones(2).bfloat16()},
        fp8_config(weight_block_size=list(block)),
    )
    source = CheckpointSource(folder)
    assert set(source.names) == {NAME, "other"}
    assert source.dropped == {NAME + "_scale_inv": f"the scale of {NAME}, which it was applied to"}
    assert source.config == {"model_type": "x", "torch_dtype": "float16"}
    assert source.default_dtype(NAME) == torch.float16
    assert source.default_dtype("other") == torch.bfloat16
    assert source.bytes_to_read(NAME) == weight.numel() + scale.nbytes
    assert source.bytes_to_read("other") == 4
    numbers = [[reference.e4m3(b) for b in row] for row in weight.view(torch.uint8).tolist()]
    wanted = torch.tensor(reference.dequantise(numbers, scale.tolist(), block), dtype=torch.float64)
    operand = source.operand(NAME)
    operand.prefetch()
    # The product of a 4-bit and a 24-bit significand is exact in float64: one rounding.
    assert torch.equal(everything(operand), wanted.to(torch.float32))
    for begin in range(shape[0]):
        for end in range(begin, shape[0] + 1):
            assert torch.equal(operand.rows(begin, end), wanted[begin:end].to(torch.float32))
    operand.release()


def test_default_block_is_128(tmp_path):
    weight, scale = codes(130, 257), scales(2, 3)
    config = fp8_config() | {"dtype": "torch.float32"}
    source = CheckpointSource(
        save(tmp_path / "m", {NAME: weight, NAME + "_scale_inv": scale}, config)
    )
    got = everything(source.operand(NAME))
    assert got[129, 256] == weight[129, 256].float() * scale[1, 2]
    assert got[127, 128] == weight[127, 128].float() * scale[0, 1]
    assert source.default_dtype(NAME) == torch.float32


def test_default_dtype_is_bfloat16(tmp_path):
    folder = save(tmp_path / "m", {"w": codes(3)}, {"dtype": "float8_e4m3fn"})
    assert CheckpointSource(folder).default_dtype("w") == torch.bfloat16


CHANNELS = {
    "one": ((3, 4), (), (1, 1)),
    "one in a list": ((3, 4), (1,), (1, 1)),
    "per row, flat": ((3, 4), (3,), (3, 1)),
    "per row": ((3, 4), (3, 1), (3, 1)),
    "vector": ((4,), (1,), (1,)),
    "per expert": ((2, 3, 4), (2,), (2, 1, 1)),
    "per expert and row": ((2, 3, 4), (2, 3, 1), (2, 3, 1)),
    "four dimensions": ((2, 3, 1, 2), (1,), (1, 1, 1, 1)),
}


@pytest.mark.parametrize("case", CHANNELS)
@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv"])
def test_tensor_and_channel_scales(tmp_path, case, suffix):
    shape, sizes, broadcast = CHANNELS[case]
    weight, scale = codes(*shape), scales(*sizes)
    source = CheckpointSource(
        save(
            tmp_path / "m",
            {"w": weight, "w" + suffix: scale},
            fp8_config(quant_method="compressed-tensors"),
        )
    )
    wanted = (weight.double() * scale.double().view(broadcast)).float()
    operand = source.operand("w")
    assert torch.equal(everything(operand), wanted)
    assert torch.equal(operand.rows(1, 2), wanted[1:2])


def test_stacked_experts_in_blocks(tmp_path):
    weight, scale = codes(3, 5, 7), scales(3, 3, 3)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    source = CheckpointSource(
        save(
            tmp_path / "m",
            {name: weight, name + "_scale_inv": scale},
            fp8_config(weight_block_size=[2, 3]),
        )
    )
    expanded = scale.repeat_interleave(2, 1)[:, :5].repeat_interleave(3, 2)[:, :, :7]
    wanted = (weight.double() * expanded.double()).float()
    assert torch.equal(everything(source.operand(name)), wanted)
    assert torch.equal(source.operand(name).rows(1, 3), wanted[1:])


def test_fused_experts_with_a_scale_for_gate_and_one_for_up(tmp_path):
    weight, scale = codes(2, 6, 4), scales(2, 2, 1)
    source = CheckpointSource(
        save(
            tmp_path / "m",
            {"gate_up_proj": weight, "gate_up_proj_scale_inv": scale},
            fp8_config(weight_block_size=None),
        )
    )
    wanted = (weight.double() * scale.double().repeat_interleave(3, 1)).float()
    assert torch.equal(everything(source.operand("gate_up_proj")), wanted)


@pytest.mark.parametrize("sizes", [(2, 1, 4), (2, 4, 1)], ids=str)
def test_fbgemm_scales_the_last_dimension_of_stacked_experts(tmp_path, sizes):
    weight, scale = codes(2, 4, 4), scales(*sizes)
    source = CheckpointSource(
        save(
            tmp_path / "m",
            {"experts.down_proj": weight, "experts.down_proj_scale": scale},
            fp8_config(quant_method="fbgemm_fp8"),
        )
    )
    wanted = (weight.double() * scale.double().view(2, 1, 4)).float()
    assert torch.equal(everything(source.operand("experts.down_proj")), wanted)


@pytest.mark.parametrize("as_bytes", [True, False])
def test_scales_that_are_powers_of_two(tmp_path, as_bytes):
    weight = codes(2, 64)
    exponents = torch.tensor([[100, 127], [128, 140]], dtype=torch.uint8)
    scale = exponents if as_bytes else exponents.view(torch.float8_e8m0fnu)
    folder = tmp_path / "m"
    save(folder, {"w": weight, "w_scale_inv": exponents}, fp8_config(weight_block_size=[1, 32]))
    if not as_bytes:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes().replace(b'"dtype":"U8"', b'"dtype":"F8_E8M0"'))
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little") + 5
        path.write_bytes(length.to_bytes(8, "little") + raw[8:])
    source = CheckpointSource(folder)
    assert source._on_disk["w_scale_inv"].dtype == scale.dtype
    expanded = torch.tensor([[reference.e8m0(b) for b in row] for row in exponents.tolist()])
    wanted = weight.float() * expanded.repeat_interleave(32, 1)
    assert torch.equal(everything(source.operand("w")), wanted)


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    block=st.tuples(st.integers(1, 10), st.integers(1, 10)),
    cuts=st.lists(st.integers(0, 9), max_size=4),
)
def test_cuts_do_not_matter(tmp_path_factory, rows, columns, block, cuts):
    weight = codes(rows, columns)
    scale = scales(-(-rows // block[0]), -(-columns // block[1]))
    folder = save(
        tmp_path_factory.mktemp("fp8"),
        {"w": weight, "w_scale_inv": scale},
        fp8_config(weight_block_size=list(block)),
    )
    operand = CheckpointSource(folder).operand("w")
    edges = sorted({0, rows, *(min(cut, rows) for cut in cuts)})
    parts = [operand.rows(a, b) for a, b in itertools.pairwise(edges)]
    expanded = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)
    wanted = (weight.double() * expanded[:, :columns].double()).float()
    assert torch.equal(torch.cat(parts), wanted)


def test_what_scales_activations_is_dropped_with_the_reason(tmp_path):
    spare = {
        "layers.0.q_proj.input_scale": torch.ones(1),
        "layers.0.k_proj.output_scale": torch.ones(1),
        "layers.0.k_scale": torch.ones(1),
        "layers.0.experts.down_proj_activation_scale": torch.ones(4),
    }
    tensors = spare | {
        "layers.0.q_proj.weight": codes(2, 2),
        "layers.0.q_proj.weight_scale": torch.ones(()),
        "layers.0.q_proj.weight_zero_point": torch.zeros(1, dtype=torch.int8),
        "norm.weight": torch.ones(2),
        "layers.0.attention_scale": torch.ones(1),
    }
    source = CheckpointSource(
        save(tmp_path / "m", tensors, fp8_config(quant_method="compressed-tensors"))
    )
    assert set(source.names) == {
        "layers.0.q_proj.weight",
        "norm.weight",
        "layers.0.attention_scale",
    }
    assert set(source.dropped) | set(source.names) == set(tensors)
    assert all("scales activations" in source.dropped[name] for name in spare)
    assert "all of them 0" in source.dropped["layers.0.q_proj.weight_zero_point"]
    assert "layers.0.k_scale" not in source


def test_a_quantised_cache_alone_leaves_weights_as_they_are(tmp_path):
    tensors = {"w.weight": torch.ones(2, 2), "layers.0.k_scale": torch.ones(1)}
    config = fp8_config(
        quant_method="compressed-tensors", config_groups={}, kv_cache_scheme={"num_bits": 8}
    )
    source = CheckpointSource(save(tmp_path / "m", tensors, config))
    assert source.names == ["w.weight"] and "quantization_config" not in source.config
    assert source.operand("w.weight").stored() is not None


def test_an_unquantised_model_keeps_tensors_with_such_names(tmp_path):
    tensors = {"k_scale": torch.ones(2), "a.weight_scale": torch.ones(1), "a.scale": torch.ones(1)}
    source = CheckpointSource(save(tmp_path / "m", tensors, {}))
    assert set(source.names) == set(tensors) and source.dropped == {}


def test_tensor_gives_no_codes(tmp_path):
    source = CheckpointSource(save(tmp_path / "m", {"w": codes(2)}))
    with pytest.raises(CheckpointError, match="'w' is float8_e4m3fn on disk, which only a merge"):
        source.tensor("w")


BAD = {
    "no scale": ({NAME: codes(2, 2)}, fp8_config(), f"{NAME}' is float8_e4m3fn but has no scale"),
    "one without scale": (
        {"a": codes(2, 2), "b": codes(2, 2), "b_scale": torch.ones(1)},
        {},
        "tensor 'a' is float8_e4m3fn but has no scale: expected one of a_scale_inv, a_scale",
    ),
    "two scales": (
        {"a": codes(2), "a_scale": torch.ones(1), "a_scale_inv": torch.ones(1)},
        {},
        "tensor 'a' has two scales, a_scale_inv and a_scale",
    ),
    "grid of other blocks": (
        {"a": codes(4, 4), "a_scale_inv": torch.ones(2, 2)},
        fp8_config(weight_block_size=[3, 1]),
        r"'a_scale_inv': expected one scale, one per row, or one per block of 3 x 1 of a \[4, 4\]",
    ),
    "scale of another size": (
        {"a": codes(4, 4), "a_scale": torch.ones(3)},
        fp8_config(),
        r"'a_scale': expected one scale, one per row of a \[4, 4\], got \[3\]",
    ),
    "whole numbers": (
        {"a": codes(4, 4), "a_scale": torch.ones(4, dtype=torch.int32)},
        fp8_config(),
        "'a_scale': expected a scale in floating point, got int32",
    ),
    "block size of one": (
        {"a": codes(4, 4), "a_scale_inv": torch.ones(1)},
        fp8_config(weight_block_size=[128]),
        r"expected the block size of quantization_config as two sizes of at least 1, got \[128\]",
    ),
    "scale of a wide tensor": (
        {"a.weight": torch.ones(2), "a.weight_scale": torch.ones(1), "b": codes(2)}
        | {"b_scale": torch.ones(1)},
        fp8_config(),
        "'a.weight_scale' scales a.weight, which should be FP8 but is float32",
    ),
    "scale of nothing": (
        {"a_scale_inv": torch.ones(1), "b": codes(2), "b_scale": torch.ones(1)},
        fp8_config(),
        "'a_scale_inv' scales a, which should be FP8 but is missing",
    ),
    "zero point": (
        {"a.weight": codes(2), "a.weight_scale": torch.ones(1), "a.weight_zero_point": codes(1)},
        fp8_config(),
        "'a.weight_zero_point': expected zero points of 0",
    ),
    "scales lost": ({"a": torch.ones(2)}, fp8_config(), r"quantised \(fp8\), but no tensor is FP8"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses_inconsistent_scales(tmp_path, case):
    tensors, config, message = BAD[case]
    with pytest.raises(CheckpointError, match=message):
        CheckpointSource(save(tmp_path / "m", tensors, config))


BYTES = torch.ones(4, 2, dtype=torch.uint8)
WORDS = torch.ones(4, 2, dtype=torch.int32)
OTHERS = {
    "bitsandbytes 4-bit": ({"a.weight": BYTES, "a.weight.absmax": torch.ones(2)}, {}),
    "bitsandbytes 4-bit state": (
        {"a.weight": BYTES, "a.weight.quant_state.bitsandbytes__nf4": BYTES},
        {},
    ),
    "bitsandbytes 8-bit": ({"a.weight": BYTES.view(torch.int8), "a.SCB": torch.ones(4)}, {}),
    "GPTQ": ({"a.qweight": WORDS, "a.qzeros": WORDS}, fp8_config(quant_method="gptq")),
    "AWQ": ({"a.qweight": WORDS, "a.qzeros": WORDS}, fp8_config(quant_method="awq")),
    "GPTQ or AWQ": ({"a.qweight": WORDS}, {}),
    "MXFP4": ({"experts.up_blocks": BYTES, "experts.up_scales": BYTES}, {}),
    "NVFP4": ({"a.weight": BYTES, "a.weight_scale_2": torch.ones(1)}, {}),
    "compressed-tensors' packed": ({"a.weight_packed": WORDS}, {}),
    "HQQ": ({"a.W_q": BYTES}, {}),
    "integer": ({"a.weight": BYTES.view(torch.int8), "a.weight_scale": torch.ones(4)}, {}),
    "torchao": ({"a.weight": torch.ones(2)}, fp8_config(quant_method="torchao")),
    "rotated": (
        {"a.weight": torch.ones(2)},
        fp8_config(quant_method="compressed-tensors", transform_config={"a": 1}),
    ),
    "sparse": (
        {"a.weight": torch.ones(2)},
        fp8_config(sparsity_config={"format": "sparse-24-bitmask"}),
    ),
    "smoothed": ({"a.weight": codes(2), "a.pre_quant_scale": torch.ones(2)}, fp8_config()),
}


@pytest.mark.parametrize("case", OTHERS)
def test_refuses_other_formats_by_name(tmp_path, case):
    tensors, config = OTHERS[case]
    label = case.removesuffix(" state")
    with pytest.raises(CheckpointError, match=rf"{label}.* format, which is not read: .*; merge"):
        CheckpointSource(save(tmp_path / "m", tensors, config))


@pytest.mark.parametrize("nested", [False, True])
def test_agrees_with_transformers(tmp_path, nested):
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    weight, scale = codes(256, 384), scales(2, 3)
    config = fp8_config(weight_block_size=[128, 128])
    source = CheckpointSource(
        save(
            tmp_path / "m",
            {NAME: weight, NAME + "_scale_inv": scale},
            {"text_config": config} if nested else config,
        )
    )
    assert "quantization_config" not in json.dumps(source.config)
    wanted = fp8.Fp8Dequantize(None)._dequantize_one(weight, scale)
    assert torch.equal(everything(source.operand(NAME)), wanted)

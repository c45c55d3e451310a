import json
import os
import pickle
import zipfile

import pytest
import safetensors.torch
import torch

from mergeme_ext.io import CheckpointError, CheckpointSource
from mergeme_ext.io.format import DTYPES
from mergeme_ext.io.quantised import FP8
from python_tests.io.test_source import random_tensor, same_bits

PLAIN = [d for d in DTYPES.values() if d not in (*FP8, torch.float8_e8m0fnu)]


def save(folder, value, name="pytorch_model.bin", **how):
    torch.save(value, folder / name, **how)
    return folder


@pytest.mark.parametrize("dtype", PLAIN, ids=str)
def test_reads_what_torch_saves(tmp_path, dtype):
    tensors = {
        "b": random_tensor(dtype, (3, 5)),
        "a": random_tensor(dtype, (7,), seed=1),
        "scalar": random_tensor(dtype, ()),
        "none": random_tensor(dtype, (2, 0)),
    }
    source = CheckpointSource(save(tmp_path, tensors))
    assert set(source.names) == set(tensors)
    for name, tensor in tensors.items():
        assert same_bits(source.tensor(name), tensor)
        info = source.info(name)
        assert (info.dtype, info.shape) == (dtype, tuple(tensor.shape))
        assert info.file == "pytorch_model.bin"


def test_maps_and_neither_prefetch_nor_release_changes_anything(tmp_path):
    tensors = {"w": torch.arange(100_000.0), "v": torch.arange(5000).bfloat16()}
    source = CheckpointSource(save(tmp_path, tensors))
    operand = source.operand("w")
    assert operand.stored().data_ptr() == source.tensor("w").data_ptr()
    assert source.names == ["w", "v"]  # as they lie in the file
    for _ in range(2):
        source.prefetch("w")
        assert torch.equal(operand.rows(0, 100_000), tensors["w"])
        source.release("w")
        assert torch.equal(source.tensor("v"), tensors["v"])
    del source
    assert torch.equal(operand.stored(), tensors["w"])


def test_shared_and_strided_tensors(tmp_path):
    weight = torch.randn(4, 6)
    state = {
        "embed": weight,
        "head": weight,
        "turned": weight.t(),
        "part": weight[1:3],
        "column": weight[:, 2],
        "wide": weight[:1].expand(3, 6),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    source = CheckpointSource(save(tmp_path, state))
    for name, tensor in state.items():
        assert torch.equal(source.tensor(name), tensor)
        assert source.tensor(name).is_contiguous() and not source.tensor(name).requires_grad
        operand = source.operand(name)
        operand.prefetch()
        half = tensor.shape[0] // 2
        got = torch.cat([operand.rows(0, half), operand.rows(half, tensor.shape[0])])
        assert torch.equal(got, tensor) and operand.rows(0, half).is_contiguous()
        assert (operand.stored() is None) == (name in ("turned", "column", "wide"))
        operand.release()
    assert source.tensor("embed").data_ptr() == source.tensor("head").data_ptr()
    assert torch.equal(source.tensor("part"), weight[1:3])


def test_shards(tmp_path):
    save(tmp_path, {"a": torch.ones(2)}, "pytorch_model-00001-of-00002.bin")
    save(tmp_path, {"b": torch.zeros(3)}, "other.bin")
    weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "other.bin"}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    source = CheckpointSource(tmp_path)
    assert sorted(source.names) == ["a", "b"] and source.info("b").file == "other.bin"
    for bad in ("../other.bin", "/other.bin", "other.safetensors"):
        index.write_text(json.dumps({"weight_map": weight_map | {"b": bad}}))
        with pytest.raises(CheckpointError, match=r"expected the name of a .bin file in the same"):
            CheckpointSource(tmp_path)


def test_safetensors_come_first(tmp_path):
    save(tmp_path, {"pickled": torch.ones(2)})
    safetensors.torch.save_file({"safe": torch.ones(2)}, tmp_path / "model.safetensors")
    assert CheckpointSource(tmp_path).names == ["safe"]


def test_fp8_with_scales(tmp_path):
    codes = torch.tensor([[1.0, 2.0]]).to(torch.float8_e4m3fn)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    source = CheckpointSource(save(tmp_path, {"w": codes, "w_scale_inv": torch.tensor([[0.5]])}))
    assert source.operand("w").rows(0, 1).tolist() == [[0.5, 1.0]]


class Attack:
    """Leaves a file behind when it is unpickled by a careless reader."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_runs_no_program_hidden_in_a_file(tmp_path):
    trace = tmp_path / "trace"
    save(tmp_path, {"w": torch.ones(2), "x": Attack(trace)})
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: holds more than weights"):
        CheckpointSource(tmp_path)
    assert not trace.exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert trace.exists()  # the attack would have worked


def test_a_bare_pickle_is_not_unpickled(tmp_path):
    trace = tmp_path / "trace"
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Attack(trace)))
    with pytest.raises(CheckpointError, match=r"expected a file of torch.save since torch 1.6"):
        CheckpointSource(tmp_path)
    assert not trace.exists()


def test_refuses_the_old_format_with_advice(tmp_path):
    save(tmp_path, {"w": torch.ones(2)}, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"older format cannot be mapped: load .* save it"):
        CheckpointSource(tmp_path)


BAD = {
    "no dictionary": ([torch.ones(2)], "expected a dictionary of tensors, got list"),
    "nested": (
        {"state_dict": {"w": torch.ones(2)}},
        "expected 'state_dict' to be a tensor, got dict; a checkpoint of a training run is not",
    ),
    "number as name": ({3: torch.ones(2)}, "expected tensor names as text, got 3"),
    "sparse": (
        {"w": torch.eye(3).to_sparse()},
        "'w': expected a plain tensor .* sparse_coo",
    ),
    "complex double": ({"w": torch.ones(2, dtype=torch.complex128)}, "a Tensor of complex128"),
    "meta": ({"w": torch.ones(2, device="meta")}, "on meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses_what_is_no_state_dict(tmp_path, case):
    value, message = BAD[case]
    with pytest.raises(CheckpointError, match=message):
        CheckpointSource(save(tmp_path, value))


def test_refuses_compressed_and_big_endian_archives(tmp_path):
    save(tmp_path, {"w": torch.zeros(1000)}, "plain")
    target = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(tmp_path / "plain") as plain:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as other:
            for name in plain.namelist():
                other.writestr(name, plain.read(name))
        with pytest.raises(CheckpointError, match="is compressed, so it cannot be mapped"):
            CheckpointSource(tmp_path)
        with zipfile.ZipFile(target, "w") as other:
            for name in plain.namelist():
                text = b"big" if name.endswith("byteorder") else plain.read(name)
                other.writestr(name, text)
        with pytest.raises(CheckpointError, match="big-endian"):
            CheckpointSource(tmp_path)


def test_a_truncated_or_damaged_file_is_refused_or_harmless(tmp_path):
    save(tmp_path, {"w": torch.arange(64.0), "v": torch.ones(3)}, "whole")
    whole = (tmp_path / "whole").read_bytes()
    g = torch.Generator().manual_seed(0)
    opened = 0
    for i in range(200):
        raw = bytearray(whole)
        for at in torch.randint(0, len(raw), (1 + i % 3,), generator=g).tolist():
            raw[at] ^= 1 << i % 8
        if i % 4 == 0:
            raw = raw[: int(torch.randint(0, len(raw), (), generator=g))]
        (tmp_path / "pytorch_model.bin").write_bytes(raw)
        try:
            source = CheckpointSource(tmp_path)
        except CheckpointError:
            continue
        opened += 1
        for name in source.names:
            source.operand(name).rows(0, source.info(name).shape[0]).tolist()
    assert opened

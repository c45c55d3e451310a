import json
import struct

import pytest
import safetensors.torch
import torch

from mergeme_ext.io import CheckpointError, CheckpointSource, Converted, Stored
from mergeme_ext.io.operands import num_rows


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (2, 0), (0, 3), (3, 2, 2)], ids=str)
def test_stored_rows(shape):
    tensor = torch.randn(shape)
    operand = Stored(tensor)
    assert (operand.dtype, operand.shape) == (tensor.dtype, shape)
    assert operand.stored() is tensor
    count = num_rows(operand)
    assert count == (shape[0] if shape else 1)
    halves = [operand.rows(0, count // 2), operand.rows(count // 2, count)]
    assert torch.equal(torch.cat(halves), tensor.view(count, *shape[1:]))
    for begin, end in ((-1, 0), (0, count + 1), (1, 0)):
        with pytest.raises(ValueError, match=rf"part of \[0, {count}\), got \[{begin}, {end}\)"):
            operand.rows(begin, end)


def test_converted_converts_and_passes_through():
    tensor = torch.tensor([1 + 2**-8, 3.0, 1.005])
    bfloat16 = Converted(Stored(tensor), torch.bfloat16)
    assert (bfloat16.dtype, bfloat16.shape) == (torch.bfloat16, (3,))
    assert bfloat16.stored() is None
    assert bfloat16.rows(0, 3).dtype == torch.bfloat16
    assert bfloat16.rows(0, 3).tolist() == [1.0, 3.0, 1 + 2**-7]
    assert Converted(Stored(tensor), torch.float32).stored() is tensor


def test_source_gives_stored_operands(tmp_path):
    weight = torch.arange(6.0).view(3, 2)
    safetensors.torch.save_file({"w": weight}, tmp_path / "model.safetensors")
    source = CheckpointSource(tmp_path)
    operand = source.operand("w")
    assert operand.stored().data_ptr() == source.tensor("w").data_ptr()
    operand.prefetch()
    operand.release()
    assert torch.equal(operand.rows(1, 3), weight[1:])
    with pytest.raises(CheckpointError, match="has no tensor 'v'"):
        source.operand("v")


def test_unaligned_data_are_copied_by_rows(tmp_path):
    weight = torch.arange(12.0).view(3, 2, 2)
    header = json.dumps({"w": {"dtype": "F32", "shape": [3, 2, 2], "data_offsets": [0, 48]}})
    header += " " * ((3 - len(header)) % 8)
    (tmp_path / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header.encode() + weight.numpy().tobytes()
    )
    operand = CheckpointSource(tmp_path).operand("w")
    assert operand.stored() is None
    operand.prefetch()
    assert torch.equal(operand.rows(1, 3), weight[1:])
    assert operand.rows(2, 2).shape == (0, 2, 2)
    operand.release()

"""Whole tensors out of operands: the mapped file itself, memory, or a file if it is too large."""

import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mergeme_ext.io.operands import Operand, row_blocks

__all__ = ["lay_out"]


def lay_out(operand: Operand, *, folder: Path, in_memory: int) -> Tensor:
    """Return the whole of ``operand`` as a tensor; do not write into it.

    What is not stored as it is gets computed block by block, into memory if it takes at most
    ``in_memory`` bytes, else into an unnamed file in ``folder``, which the system may write out
    when memory is short.

    Raises:
        OSError: There is no room in ``folder``.
    """
    stored = operand.stored()
    if stored is not None:
        return stored
    numel = torch.Size(operand.shape).numel()
    nbytes = numel * operand.dtype.itemsize
    if nbytes <= in_memory or nbytes == 0:
        whole = torch.empty(numel, dtype=operand.dtype)
        for start, block in _blocks(operand):
            whole[start : start + block.numel()] = block
        return whole.view(operand.shape)
    with tempfile.TemporaryFile(dir=folder, prefix="scratch-") as file:
        os.truncate(file.fileno(), nbytes)
        for start, block in _blocks(operand):
            data = memoryview(block.contiguous().view(torch.uint8).numpy())
            offset = start * operand.dtype.itemsize
            while data:
                written = os.pwrite(file.fileno(), data, offset)
                data, offset = data[written:], offset + written
        mapped = mmap.mmap(file.fileno(), nbytes)
    return torch.frombuffer(mapped, dtype=operand.dtype).view(operand.shape)


def _blocks(operand: Operand) -> Iterator[tuple[int, Tensor]]:
    """Yield the first element's flat index, and a flat block of whole rows."""
    row = torch.Size(operand.shape[1:]).numel()
    for begin, end in row_blocks(operand):
        yield begin * row, operand.rows(begin, end).reshape(-1)

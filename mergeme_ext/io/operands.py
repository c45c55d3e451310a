"""Tensors a merge reads: as they lie on disk, or computed row by row from what lies there."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "Converted",
    "Cut",
    "Operand",
    "Stored",
    "check_rows",
    "num_rows",
    "row_blocks",
    "same_values",
]

_BLOCK_BYTES = 8 * 2**20


class Operand(Protocol):
    """One tensor of an input. Wrappers are operands too, so they compose.

    Rows are slices along the first dimension; a 0-d tensor is one row of one element.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    def stored(self) -> Tensor | None:
        """Return the whole tensor if it is there as it is, without a copy; None otherwise."""

    def rows(self, begin: int, end: int) -> Tensor:
        """Return rows ``[begin, end)``: a view if the tensor is stored, fresh memory otherwise.

        Raises:
            ValueError: They are not within the tensor.
        """

    def prefetch(self) -> None:
        """Ask the system to start reading what this is computed from; returns at once."""

    def release(self) -> None:
        """Give the memory of what this is computed from back to the system."""


def num_rows(operand: Operand) -> int:
    """Return how many rows ``operand`` has; a 0-d tensor has one."""
    return operand.shape[0] if operand.shape else 1


def check_rows(operand: Operand, begin: int, end: int) -> None:
    """Check that rows ``[begin, end)`` are within ``operand``.

    Raises:
        ValueError: They are not.
    """
    if not 0 <= begin <= end <= num_rows(operand):
        raise ValueError(f"rows: expected a part of [0, {num_rows(operand)}), got [{begin}, {end})")


def row_blocks(operand: Operand) -> Iterator[tuple[int, int]]:
    """Yield stretches of rows, in order, that take about 8 MiB each."""
    rows = num_rows(operand)
    row_bytes = torch.Size(operand.shape[1:]).numel() * operand.dtype.itemsize
    step = max(1, _BLOCK_BYTES // max(1, row_bytes))
    for begin in range(0, rows, step):
        yield begin, min(rows, begin + step)


def same_values(one: Operand, other: Operand) -> bool:
    """Whether two operands are equal in shape, dtype and every element; block by block."""
    if tuple(one.shape) != tuple(other.shape) or one.dtype != other.dtype:
        return False
    return all(torch.equal(one.rows(*rows), other.rows(*rows)) for rows in row_blocks(one))


def _nothing() -> None:
    pass


class Stored:
    """A tensor that is there as it is: in memory, or a view of a mapped file.

    Args:
        tensor: The tensor.
        prefetch: What ``prefetch`` does; nothing if left out.
        release: What ``release`` does; nothing if left out.
    """

    def __init__(
        self,
        tensor: Tensor,
        prefetch: Callable[[], None] = _nothing,
        release: Callable[[], None] = _nothing,
    ):
        self.dtype = tensor.dtype
        self.shape = tuple(tensor.shape)
        self._tensor = tensor
        self.prefetch = prefetch
        self.release = release

    def stored(self) -> Tensor:
        """Return the tensor."""
        return self._tensor

    def rows(self, begin: int, end: int) -> Tensor:
        """Return rows ``[begin, end)`` as a view."""
        check_rows(self, begin, end)
        return (self._tensor if self.shape else self._tensor.view(1))[begin:end]


class Converted:
    """Another operand in ``dtype``; stored if it has that dtype and is stored."""

    def __init__(self, operand: Operand, dtype: torch.dtype):
        self.dtype = dtype
        self.shape = operand.shape
        self._operand = operand
        self.prefetch = operand.prefetch
        self.release = operand.release

    def stored(self) -> Tensor | None:
        """Return the operand's tensor if nothing has to be converted."""
        return self._operand.stored() if self._operand.dtype == self.dtype else None

    def rows(self, begin: int, end: int) -> Tensor:
        """Return rows ``[begin, end)`` in ``dtype``."""
        return self._operand.rows(begin, end).to(self.dtype)


class Cut:
    """The leading part of another operand: fewer rows, fewer columns, or both."""

    def __init__(self, operand: Operand, shape: tuple[int, ...]):
        if len(shape) != len(operand.shape) or any(
            ours > whole for ours, whole in zip(shape, operand.shape, strict=True)
        ):
            raise ValueError(f"expected shape within {list(operand.shape)}, got {list(shape)}")
        self.dtype = operand.dtype
        self.shape = tuple(shape)
        self._operand = operand
        self.prefetch = operand.prefetch
        self.release = operand.release

    def stored(self) -> Tensor | None:
        """Return the operand's leading rows, if that is a stretch of a stored tensor."""
        whole = self._operand.stored()
        if whole is None or self.shape[1:] != tuple(self._operand.shape[1:]):
            return None
        return whole[: self.shape[0]] if self.shape else whole

    def rows(self, begin: int, end: int) -> Tensor:
        """Return rows ``[begin, end)``, cut."""
        check_rows(self, begin, end)
        rows = self._operand.rows(begin, end)
        return rows[(slice(None), *(slice(size) for size in self.shape[1:]))]

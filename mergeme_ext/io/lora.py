"""Weights with a low-rank update on top, computed row by row."""

import functools

import torch
from torch import Tensor

from mergeme_ext.io.operands import Operand, check_rows, num_rows
from mergeme_ext.ops import grouped_matmul_nn

__all__ = ["Adapted", "Shifted"]

# DoRA's norms over columns are summed in blocks of rows of about this many elements.
_BLOCK_ELEMENTS = 2**20


class Adapted:
    """``W + scale * B @ A`` in float32, with sums over the rank in one order for every row.

    Args:
        operand: W ``[rows, columns]`` in any floating dtype.
        a: ``[r, columns]``; ``[r, rows]`` if ``transposed``.
        b: ``[rows, r]``; ``[columns, r]`` if ``transposed``.
        scale: Of the update.
        transposed: W is stored as ``[in, out]``, so the update is ``(B @ A).T``.
        magnitude: DoRA's norm of each output ``[out]``: the sum is scaled to it. None for LoRA.

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; Liu et al. 2024, arXiv:2402.09353, eq. 5.
    """

    dtype = torch.float32

    def __init__(
        self,
        operand: Operand,
        a: Operand,
        b: Operand,
        scale: float,
        *,
        transposed: bool = False,
        magnitude: Operand | None = None,
    ):
        self.shape = operand.shape
        self._operand = operand
        self._left, self._right = (a, b) if transposed else (b, a)
        self._scale = scale
        self._transposed = transposed
        self._magnitude = magnitude

    def stored(self) -> None:
        """Return None: the sum lies nowhere."""
        return None

    def rows(self, begin: int, end: int) -> Tensor:
        """Return rows ``[begin, end)`` of the adapted weight."""
        out = self._update(begin, end)
        if self._magnitude is None:
            return out
        if self._transposed:
            return out.mul_(self._column_factors)
        norms = _sum_in_halves(out.to(torch.float64).square_(), 1).sqrt_().to(torch.float32)
        magnitude = self._magnitude.rows(begin, end).to(torch.float32)
        return out.mul_((magnitude / norms)[:, None])

    def _update(self, begin: int, end: int) -> Tensor:
        check_rows(self, begin, end)
        if self._transposed:
            left = self._left.rows(0, num_rows(self._left))[:, begin:end].t()
        else:
            left = self._left.rows(begin, end)
        left = left.to(torch.float32)
        offsets = torch.tensor([0, end - begin], dtype=torch.int32)
        out = grouped_matmul_nn(left, self._whole_right, offsets)
        return out.mul_(self._scale).add_(self._operand.rows(begin, end))

    @functools.cached_property
    def _whole_right(self) -> Tensor:
        right = self._right.rows(0, num_rows(self._right)).to(torch.float32)
        return (right.t() if self._transposed else right).contiguous()[None]

    @functools.cached_property
    def _column_factors(self) -> Tensor:
        """The magnitude over the norm of each column, which takes a pass over the whole weight."""
        squares = torch.zeros(self.shape[1], dtype=torch.float64)
        step = max(1, _BLOCK_ELEMENTS // max(1, self.shape[1]))
        for begin in range(0, self.shape[0], step):
            block = self._update(begin, min(begin + step, self.shape[0]))
            squares += _sum_in_halves(block.to(torch.float64).square_(), 0)
        magnitude = self._magnitude.rows(0, num_rows(self._magnitude)).to(torch.float32)
        return magnitude / squares.sqrt_().to(torch.float32)

    def prefetch(self) -> None:
        """Ask the system to start reading the weight and its update."""
        for operand in (self._operand, self._left, self._right):
            operand.prefetch()

    def release(self) -> None:
        """Give the memory of the weight and its update back to the system."""
        self.__dict__.pop("_whole_right", None)
        for operand in (self._operand, self._left, self._right):
            operand.release()


class Shifted:
    """A bias with an adapter's bias on top, ``b + scale * d``, in float32."""

    dtype = torch.float32

    def __init__(self, operand: Operand, shift: Operand, scale: float):
        self.shape = operand.shape
        self._operand = operand
        self._shift = shift
        self._scale = scale
        self.prefetch = operand.prefetch
        self.release = operand.release

    def stored(self) -> None:
        """Return None: the sum lies nowhere."""
        return None

    def rows(self, begin: int, end: int) -> Tensor:
        """Return elements ``[begin, end)``."""
        shift = self._shift.rows(begin, end).to(torch.float32, copy=True)
        return shift.mul_(self._scale).add_(self._operand.rows(begin, end))


def _sum_in_halves(values: Tensor, dim: int) -> Tensor:
    """Return sums along ``dim`` whose order of additions depends on its length alone.

    ``Tensor.sum`` orders them by the whole shape, so that a row's sum would depend on how many
    rows are looked at together. Overwrites ``values``.
    """
    while (size := values.shape[dim]) > 1:
        half = (size + 1) // 2
        values.narrow(dim, 0, size - half).add_(values.narrow(dim, half, size - half))
        values = values.narrow(dim, 0, half)
    return values.sum(dim)  # of one addend, or of none

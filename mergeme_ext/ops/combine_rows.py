"""Linear combinations of models with weights of their own for each row or column."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["combine_rows"]


def combine_rows(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Tensor,
    *,
    axis: str = "all",
    offset: int = 0,
    row_length: int = 1,
) -> Tensor:
    """Return ``base`` plus the sum of weights[g, m] * (tensors[m] - ``base``), g by ``axis``.

    All tensors are a chunk of flattened ones; element i of the chunk is element ``offset`` + i.

    Args:
        base: Pretrained weight, ``[n]``; float16, bfloat16, float32 or float64. None for zeros.
        tensors: M >= 1 weights with one shape ``[n]``, dtype and device, those of ``base``.
        weights: float64 ``[G, M]``, dimensionless.
        axis: "all": g = 0 and G = 1. "row": g is the element's row, its place in the whole tensor
            divided by ``row_length``, and G is at least the number of rows up to the chunk's end.
            "column": g is its column, the remainder of that division, and G = ``row_length``.
        offset: Flat index of the chunk's first element in the whole tensor.
        row_length: Elements in a row, at least 1; "all" does not look at it.

    Returns:
        A new contiguous tensor ``[n]`` of the inputs' dtype. Terms are added in index order in
        float32 (float64 for float64 inputs), then to ``base``, and rounded once.

    Raises:
        TypeError: A dtype is not the documented one.
        ValueError: A shape, device, name or number does not match, or ``tensors`` is empty.

    Gradient: none; backward raises ``NotImplementedError``.

    Source: task arithmetic, Ilharco et al. 2023, arXiv:2212.04089, with weights for each row.
    """
    return torch.ops.mergeme.combine_rows.default(
        base, tensors, weights, axis=axis, offset=offset, row_length=row_length
    )


def _fake(base, tensors, weights, *, axis, offset, row_length):
    return torch.empty_like(tensors[0], memory_format=torch.contiguous_format)


def _backward(ctx, grad):
    raise NotImplementedError("mergeme::combine_rows has no gradient")


def register(namespace: str) -> None:
    """Register fake and backward of this op in ``namespace``."""
    name = f"{namespace}::combine_rows"
    torch.library.register_fake(name, _fake)
    torch.library.register_autograd(name, _backward)


register("mergeme")

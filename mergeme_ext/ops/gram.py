"""Inner products between models, from which angles, norms and means on spheres follow."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["gram"]


def gram(base: Tensor | None, tensors: Sequence[Tensor], *, axis: str = "all") -> Tensor:
    """Return the inner products of all pairs of x = tensors[m] - ``base``, along ``axis``.

    Args:
        base: Pretrained weight, any shape; float16, bfloat16, float32 or float64. None for x =
            tensors[m].
        tensors: M >= 1 weights of one shape, dtype and device, those of ``base``.
        axis: What the vectors are. "all": each tensor is one. "row": each stretch along the last
            dimension, R of them in row-major order; a tensor of one dimension is one row.
            "column": each stretch along the first dimension, C of them; a tensor of one dimension
            is one column.

    Returns:
        float64 ``[1, M, M]``, ``[R, M, M]`` or ``[C, M, M]``, symmetric, new and contiguous.
        Differences are formed in float32 (float64 for float64 inputs); products are formed (so
        that those of float32 numbers are exact) and summed in float64, in blocks and an order that
        neither threads nor devices change, so they do not change a bit.

    Raises:
        TypeError: A dtype is not the documented one.
        ValueError: A shape, device or name does not match, or ``tensors`` is empty.

    Gradient: none; backward raises ``NotImplementedError``.

    Source: Shoemake 1985, "Animating rotation with quaternion curves", and all that followed it
    need no more of the inputs than these; see the merge methods.
    """
    return torch.ops.mergeme.gram.default(base, tensors, axis=axis)


def _fake(base, tensors, *, axis):
    shape, num_models = tensors[0].shape, len(tensors)
    groups = {"all": 1, "row": math.prod(shape[:-1]), "column": math.prod(shape[1:])}[axis]
    return tensors[0].new_empty((groups, num_models, num_models), dtype=torch.float64)


def _backward(ctx, grad):
    raise NotImplementedError("mergeme::gram has no gradient")


def register(namespace: str) -> None:
    """Register fake and backward of this op in ``namespace``."""
    name = f"{namespace}::gram"
    torch.library.register_fake(name, _fake)
    torch.library.register_autograd(name, _backward)


register("mergeme")

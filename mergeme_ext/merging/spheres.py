"""Merges whose result is a linear combination found from inner products alone.

First one pass over the tensors for their Gram matrices, then a few scalars, then the combination:
shared by the methods that work with angles.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mergeme_ext.merging.registry import Combine
from mergeme_ext.ops import combine_rows, gram

__all__ = ["combination", "gram_of", "norms_of", "slerp_weights"]

# Below this sine two directions count as parallel. Cosines are known to about 1e-16, so angles near
# 0 and pi to about 1e-8.
_SMALLEST_SINE = 1e-7
# Matrices solved at a time: few enough for torch to leave them to one thread, so that a number's
# place among them does not decide which code computes it.
_GROUPS = 2**14


def gram_of(base: Tensor | None, tensors: Sequence[Tensor], axis: str = "all") -> Tensor:
    """Return the Gram matrices ``[G, M, M]`` of tensors (minus a base) on the CPU; see the op."""
    return gram(base, tensors, axis=axis).cpu()


def norms_of(g: Tensor) -> Tensor:
    """Return the norms ``[G, M]`` of the vectors behind Gram matrices ``[G, M, M]``."""
    return g.diagonal(dim1=1, dim2=2).sqrt()


def combination(
    solve: Callable[[Tensor], Tensor], g: Tensor, like: Tensor, *, axis: str, with_base: bool
) -> Combine:
    """Return the function that merges stretches: a base plus a combination of all tensors.

    Args:
        solve: From Gram matrices ``[G, M, M]`` to weights ``[G, M]``, each by itself.
        g: All of them, float64.
        like: A whole tensor, for its shape.
        axis: "all", "row" or "column", as for the op.
        with_base: Weigh the tensors minus the base and add the base. Without, the base is not
            looked at.
    """
    if like.numel() == 0:
        return lambda base, tensors, offset: tensors[0].clone()
    weights = torch.cat([solve(part) for part in g.split(_GROUPS)])
    row_length = 1
    if axis == "row" and like.dim():
        row_length = like.shape[-1]
    elif axis == "column" and like.dim():
        row_length = math.prod(like.shape[1:])

    def combine(base: Tensor | None, tensors: Sequence[Tensor], offset: int) -> Tensor:
        return combine_rows(
            base if with_base else None,
            tensors,
            weights.to(tensors[0].device),
            axis=axis,
            offset=offset,
            row_length=row_length,
        )

    return combine


def slerp_weights(
    g: Tensor, t: float, *, smallest_norm: float, short: float, largest_cosine: float = 1.0
) -> Tensor:
    """Return the weights ``[G, 2]`` of both ends of an arc at ``t``.

    Args:
        g: Gram matrices of the two ends, ``[G, 2, 2]``.
        t: 0 is the first, 1 the second end.
        smallest_norm: Vectors no longer than this have no direction.
        short: What such vectors are divided by in place of their norm.
        largest_cosine: Beyond it, to either side, the two are interpolated linearly; so are
            vectors so nearly parallel or opposite that the arc is not known.
    """
    norms = norms_of(g)
    long = norms > smallest_norm
    lengths = torch.where(long, norms, short)
    # The root of the product: of equal vectors it is the product exactly, and their cosine is 1.
    both = torch.where(long.all(1), (g[:, 0, 0] * g[:, 1, 1]).sqrt(), lengths[:, 0] * lengths[:, 1])
    cosine = (g[:, 0, 1] / both).clamp(-1, 1)
    angle = cosine.acos()
    sine = angle.sin()
    linear = (sine < _SMALLEST_SINE) | (cosine.abs() > largest_cosine)
    safe = torch.where(linear, 1.0, sine)
    first = torch.where(linear, 1 - t, ((1 - t) * angle).sin() / safe)
    second = torch.where(linear, t, (t * angle).sin() / safe)
    return torch.stack([first, second], dim=1)

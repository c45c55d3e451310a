"""Multi-SLERP: the mean direction of any number of models, at their mean length."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergeme_ext.merging.parameters import NormalizeWeights, SmallestNorm, Weights
from mergeme_ext.merging.registry import Combine, Scope, merge_method
from mergeme_ext.merging.spheres import combination, gram_of, norms_of

# Directions known to 1e-16 cancel to about 1e-8 at best.
_SMALLEST_MEAN = 1e-7


@merge_method(
    "multislerp",
    paper="Arcee AI 2025, in mergekit (no paper)",
    scope=Scope.TENSOR,
    needs_base=False,
    takes_base=True,
)
def multislerp(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    *,
    weights: Weights,
    normalize_weights: NormalizeWeights = True,
    eps: SmallestNorm = 1e-8,
    tensor_name: str = "",
    notes: dict | None = None,
) -> Combine:
    """Merge to the direction of sum_i w_i x_i / norm(x_i) at the length sum_i w_i norm(x_i).

    The method is defined by a step from that direction m along the weighted mean of the x_i's
    tangents u_i - (u_i . m) m. That mean is s - (s . m) m for s = sum_i w_i u_i, which is zero as m
    is the direction of s: no step is left.

    Args:
        base: If given, task vectors are merged and added to it.
        tensors: M weights of one shape. A single one is its own mean.
        weights: M mixing weights.
        normalize_weights: Divide them by their sum.
        eps: Added to norms before dividing by them.
        tensor_name: Name of the tensor; the engine fills it in.
        notes: Gets ``linear`` if two opposite tensors were mixed linearly instead; the engine fills
            it in.

    Raises:
        ValueError: The weights sum to zero, or the directions of more than two tensors cancel.
    """
    w = torch.tensor(weights, dtype=torch.float64)
    if normalize_weights:
        total = w.sum()
        if total.abs() < 1e-8:
            raise ValueError(
                "multislerp: expected weights with a sum other than 0 to normalize by, "
                f"got {list(weights)}"
            )
        w = w / total

    def solve(g: Tensor) -> Tensor:
        if len(w) == 1:
            return torch.ones(1, 1, dtype=torch.float64)
        norms = norms_of(g)[0]
        direction = w / (norms + eps)
        length = (direction * (g[0] * direction).sum(1)).sum().clamp(min=0).sqrt()
        if not norms.any():
            return w[None]
        if length < max(eps, _SMALLEST_MEAN):
            if len(w) > 2:
                where = f" of tensor {tensor_name!r}" if tensor_name else ""
                raise ValueError(
                    f"multislerp: expected directions{where} that do not cancel, got a weighted "
                    f"mean of length {length.item():.3g}; change the weights, or merge linearly"
                )
            if notes is not None:
                notes["linear"] = True
            return w[None]
        return (direction * ((w * norms).sum() * math.cos(eps) / length))[None]

    g = gram_of(base, tensors)
    return combination(solve, g, tensors[0], axis="all", with_base=base is not None)

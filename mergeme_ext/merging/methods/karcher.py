"""Karcher mean: the point on the sphere that is nearest to all models' directions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergeme_ext.merging.parameters import MaxIter, Tolerance, Weights
from mergeme_ext.merging.registry import Combine, Scope, merge_method
from mergeme_ext.merging.spheres import combination, gram_of, norms_of


@merge_method(
    "karcher",
    paper="Karcher 2014, arXiv:1407.2087",
    scope=Scope.TENSOR,
    needs_base=False,
)
def karcher(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    *,
    weights: Weights = 1.0,
    max_iter: MaxIter = 10,
    tol: Tolerance = 1e-5,
    notes: dict | None = None,
) -> Combine:
    """Merge to the weighted Karcher mean of the directions at the weighted mean of the norms.

    From the direction of the weighted mean of unit vectors, each step follows the weighted mean of
    the tangents to them. All of it happens on M coefficients: the steps need inner products only.

    Args:
        base: Not looked at; to have the base in the mean, list it among the models.
        tensors: M weights of one shape.
        weights: M numbers of at least 0, not all 0; scale does not matter.
        max_iter: Steps at most.
        tol: A tensor whose norm is not above it has no direction (its norm counts in the mean); a
            unit vector nearer than this, or as near to being opposite, pulls nowhere; a shorter
            step is the last.
        notes: Gets ``iterations``, the steps taken, and ``last_step``, the last one's length; the
            engine fills it in.

    If no tensor has a direction, the result is the weighted mean.

    Raises:
        ValueError: A weight is negative, or all are 0.
    """
    w = torch.tensor(weights, dtype=torch.float64)
    if (w < 0).any() or w.sum() <= 0:
        raise ValueError(f"karcher: expected weights of at least 0, not all 0, got {list(weights)}")
    w = w / w.sum()

    def solve(g: Tensor) -> Tensor:
        norms = norms_of(g)[0]
        active = (norms > tol) & (w > 0)
        if not active.any():
            return w[None]
        unit = norms[active]
        pull = w[active] / w[active].sum()
        cosines = (g[0][active][:, active] / (unit * unit[:, None])).clamp(-1, 1)
        mean, steps, length = _mean_direction(cosines, pull, max_iter, tol)
        if notes is not None:
            notes["iterations"], notes["last_step"] = steps, length
        out = torch.zeros_like(w)
        out[active] = mean * (w * norms).sum() / unit
        return out[None]

    g = gram_of(None, tensors)
    return combination(solve, g, tensors[0], axis="all", with_base=False)


def _length(cosines: Tensor, v: Tensor) -> Tensor:
    return (v * (cosines * v).sum(1)).sum().clamp(min=0).sqrt()


def _mean_direction(
    cosines: Tensor, pull: Tensor, max_iter: int, tol: float
) -> tuple[Tensor, int, float]:
    """Return the mean as coefficients of unit vectors, the steps taken and the last one's length.

    Args:
        cosines: Inner products of the unit vectors, ``[M, M]``.
        pull: Their weights, ``[M]``, with sum 1.
        max_iter: Steps at most.
        tol: See ``karcher``.
    """
    length = _length(cosines, pull)
    mean = pull / length if length >= tol else torch.eye(len(pull), dtype=pull.dtype)[0]
    for steps in range(max_iter):
        cosine = (cosines * mean).sum(1).clamp(-1, 1)
        angle = cosine.acos()
        moves = (angle >= tol) & (angle <= torch.pi - tol)
        force = torch.where(moves, pull * angle / torch.where(moves, angle.sin(), 1.0), 0.0)
        step = force - (force * cosine).sum() * mean
        length = _length(cosines, step)
        if length < tol:
            return mean, steps, length.item()
        mean = length.cos() * mean + length.sin() / length * step
        mean = mean / _length(cosines, mean)
    return mean, max_iter, length.item() if max_iter else 0.0

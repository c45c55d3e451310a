"""Model Stock: how far to go from the base to the mean, by the angle between task vectors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergeme_ext.merging.parameters import ClampT, FilterWise
from mergeme_ext.merging.registry import Combine, Scope, merge_method
from mergeme_ext.merging.spheres import combination, gram_of, norms_of

_SMALLEST_PRODUCT = 1e-6
_SMALLEST_DIVISOR = 1e-6


@merge_method(
    "model_stock",
    paper="Jang et al. 2024, arXiv:2403.19522",
    scope=Scope.TENSOR,
    num_models=(2, None),
)
def model_stock(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    filter_wise: FilterWise = False,
    clamp_t: ClampT = False,
    notes: dict | None = None,
) -> Combine:
    """Merge t * mean(tensors) + (1 - t) * base with t = M c / (1 + (M - 1) c).

    c is the mean cosine between the M task vectors, over all pairs.

    Args:
        base: Pretrained weight, any shape.
        tensors: M >= 2 tuned weights, each shaped like ``base``.
        filter_wise: Take c and t of each row (the last dimension) by itself.
        clamp_t: Keep t in [0, 1]. Task vectors that point apart make c negative, and t with it:
            the result then lies beyond the base, far beyond as c nears -1 / (M - 1).
        notes: Gets ``t`` and ``cosine`` (for rows: their least, mean and greatest), and ``floored``
            if a product of norms was below 1e-6, which makes a cosine smaller than it is; the
            engine fills it in.

    A divisor 1 + (M - 1) c below 1e-6 makes t zero: the mean of such task vectors is, too.

    Departs from the paper, whose t for more than two models is this formula, but found per layer
    from all of a layer's weights: here each tensor, or row, has its own.
    """
    axis = "row" if filter_wise else "all"
    g = gram_of(base, tensors, axis)
    count, seen = len(tensors), []

    def solve(g: Tensor) -> Tensor:
        norms = norms_of(g)
        total, floored = torch.zeros(len(g), dtype=torch.float64), False
        for j in range(count):
            for i in range(j):
                product = norms[:, i] * norms[:, j]
                floored = floored or bool(((product < _SMALLEST_PRODUCT) & (product > 0)).any())
                total += (g[:, i, j] / product.clamp(min=_SMALLEST_PRODUCT)).clamp(-1, 1)
        cosine = total / (count * (count - 1) / 2)
        divisor = 1 + (count - 1) * cosine
        t = torch.where(
            divisor < _SMALLEST_DIVISOR, 0.0, count * cosine / divisor.clamp(min=_SMALLEST_DIVISOR)
        )
        if clamp_t:
            t = t.clamp(0, 1)
        seen.append((t, cosine, floored))
        return (t / count)[:, None].repeat(1, count)

    combine = combination(solve, g, base, axis=axis, with_base=True)
    if notes is not None and seen:
        for place, name in enumerate(("t", "cosine")):
            values = torch.cat([part[place] for part in seen])
            notes[name] = values.item() if len(values) == 1 else _range(values)
        if any(floored for *_, floored in seen):
            notes["floored"] = True
    return combine


def _range(values: Tensor) -> dict[str, float]:
    ordered = values.sort().values.tolist()
    return {"min": ordered[0], "mean": math.fsum(ordered) / len(ordered), "max": ordered[-1]}

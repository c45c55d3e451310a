"""PCB-Merging: every element of every task vector competes for its share of the merge."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergeme_ext.merging.parameters import Clip, Density, Inter, Lambda, ScopeOption, Weights
from mergeme_ext.merging.registry import Combine, Scope, Visit, merge_method
from mergeme_ext.merging.select import select
from mergeme_ext.merging.sweep import Visits, check_surveyed, in_parts, sweep, task_vectors

# Below this the shares of an element count as none.
_SMALLEST_SHARE = 1e-12


def _min_max(sizes: Tensor, low: float, high: float) -> Tensor:
    """Return clipped magnitudes brought to [0, 1]; 0 if all are equal."""
    if high <= low:
        return torch.zeros_like(sizes)
    return (sizes - low) / (high - low)


def _scores(
    xs: Sequence[Tensor], lows: Sequence[float], highs: Sequence[float], inter: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the clipped magnitudes of the task vectors ``xs``, and their competition scores."""
    sizes = [x.abs().clamp_(a, b) for x, a, b in zip(xs, lows, highs, strict=True)]
    normal = [_min_max(x, a, b) for x, a, b in zip(sizes, lows, highs, strict=True)]
    total = torch.zeros_like(xs[0])
    for x, mm in zip(xs, normal, strict=True):
        total += x if inter == "sum" else x.sign() * mm
    scores = []
    for x, mm in zip(xs, normal, strict=True):
        intra = mm.square_().mul_(len(xs)).exp_()
        scores.append((x * total).tanh_().mul_(intra))
    return sizes, scores


def _statistics(visits: Visits, parameters: Mapping[str, Any]) -> dict[str, list[float]]:
    """Find, for each model, where magnitudes are clipped and where scores begin and end."""
    clip, density, inter = (parameters[name] for name in ("clip", "density", "inter"))

    def clip_ranks(numel: int) -> list[list[int]]:
        low = int(numel * clip)
        high = max(low, int(numel * (1 - clip) - 1))
        return [[low, high] if numel else []] * len(density)

    found = select(lambda: ([x.abs() for x in xs] for _, _, xs in sweep(visits)), clip_ranks)
    lows = [ranked[0].value if ranked else 0.0 for ranked in found] or [0.0] * len(density)
    highs = [ranked[1].value if ranked else 0.0 for ranked in found] or [0.0] * len(density)

    def score_ranks(numel: int) -> list[list[int]]:
        begins = [min(int(numel * (1 - d)), numel - 1) for d in density]
        return [[begin, numel - 1] if numel else [] for begin in begins]

    def rounds():
        return (_scores(xs, lows, highs, inter)[1] for _, _, xs in sweep(visits))

    found = select(rounds, score_ranks)
    begins = [ranked[0].value if ranked else 0.0 for ranked in found] or lows
    ends = [ranked[1].value if ranked else 0.0 for ranked in found] or lows
    return {"low": lows, "high": highs, "begin": begins, "end": ends}


_SURVEYED = ("density", "clip", "inter")


def _survey(visits: Visits, parameters: Mapping[str, Any]) -> dict[str, Any]:
    if parameters["scope"] == "tensor":
        return {}
    same = {name: parameters[name] for name in _SURVEYED}
    return {"parameters": same, **_statistics(visits, parameters)}


@merge_method(
    "pcb_merging",
    paper="Du et al. 2024, arXiv:2410.02396",
    scope=Scope.MODEL,
    survey=_survey,
)
def pcb_merging(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    weights: Weights = 1.0,
    density: Density = 0.1,
    lam: Lambda = 1.0,
    clip: Clip = 1e-4,
    inter: Inter = "sum",
    scope: ScopeOption = "model",
    tensor_name: str = "",
    survey: Mapping[str, Any] | None = None,
) -> Combine:
    """Score every element of each task vector, drop all but the best, average by score.

    With a_i the magnitudes of task vector d_i, clipped, and mm the min-max normalization of a
    model's values to [0, 1], the scores are exp(M mm(a_i)^2) tanh(d_i * sum_j d_j). Raised to the
    least score of the best ``density`` and normalized again, they are the shares q_i, and the
    result is ``base + lam * sum_i weights[i] q_i sign(d_i) a_i / sum_i q_i``.

    Args:
        base: Pretrained weight, any shape.
        tensors: M tuned weights, each shaped like ``base``.
        weights: M factors on the task vectors (the paper's lambda_i). They do not enter the
            divisor.
        density: Fraction of each model's elements that get a share, in (0, 1] (the paper's r).
        lam: Factor on the merged task vector.
        clip: Magnitudes are clipped to their quantiles ``clip`` and 1 - ``clip``, in [0, 0.5); the
            upper one leaves out the largest magnitude at least, unless ``clip`` is 0.
        inter: What a task vector is held against: the ``sum`` of all task vectors, or
            (``sign_mm``) the sum of sign(d_j) mm(a_j); the authors' two scripts differ in that.
        scope: Quantiles and extremes over the whole ``model``, as in the paper, or over each
            ``tensor``, which needs no sweeps over the model but gives other results.
        tensor_name: Name of the tensor; the engine fills it in.
        survey: The engine fills it in; nothing is surveyed for ``scope="tensor"``.

    Departs from the paper: exp and tanh in place of its softmax, as in the authors' code. A model
    whose magnitudes are all equal has mm = 0; one whose best scores are all equal gets no share.
    """
    if scope == "tensor":
        visit = Visit(tensor_name, base, tensors)
        own = {"density": density, "clip": clip, "inter": inter}
        found = _statistics(lambda: iter([visit]), own)
    else:
        check_surveyed("pcb_merging", survey, density=density, clip=clip, inter=inter)
        found = survey

    def combine(base: Tensor, tensors: Sequence[Tensor], offset: int) -> Tensor:
        xs = task_vectors(base, tensors)
        sizes, scores = _scores(xs, found["low"], found["high"], inter)
        merged, total = torch.zeros_like(xs[0]), torch.zeros_like(xs[0])
        for m, (x, size, score) in enumerate(zip(xs, sizes, scores, strict=True)):
            begin, end = found["begin"][m], found["end"][m]
            share = _min_max(score.clamp_(min=begin), begin, end)
            total += share
            merged += share.mul_(x.sign()).mul_(size).mul_(weights[m])
        merged /= total.clamp_(min=_SMALLEST_SHARE)
        return merged.mul_(lam).add_(base).to(base.dtype)

    return in_parts(combine)

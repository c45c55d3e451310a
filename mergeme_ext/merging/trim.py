"""Trimming task vectors over the whole model instead of tensor by tensor."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergeme_ext.merging.select import select
from mergeme_ext.merging.sparsify import NORM_COLUMN, Thinning, keep_count, norm_scales
from mergeme_ext.merging.sweep import Visits, sweep
from mergeme_ext.ops import masked_norms

__all__ = ["survey_largest", "surveyed_thinning"]


def survey_largest(
    visits: Visits, density: Sequence[float], rescale: str, *, inclusive: bool = False
) -> dict[str, Any]:
    """Find the cuts that keep the largest magnitudes of each model's whole task vector.

    Of the model's n elements, max(1, floor(density * n)) are kept; of equal magnitudes, those of
    the earlier tensor and the lower flat index. Takes two rounds of visits (six with float64
    weights), one more where equal magnitudes lie on both sides of a cut, and one for the norms of
    a ``rescale``.

    Args:
        visits: Starts a round over the model.
        density: M fractions in (0, 1].
        rescale: ``none``, ``inverse_prob`` (divide by the density), or ``l1``, ``l2``, ``linf``
            (match that norm of the model's whole task vector).
        inclusive: Keep one element more, and whatever equals it, as the code of TIES's authors.

    Returns:
        What ``surveyed_thinning`` needs: ``thresholds`` of the M models; by tensor name, the
        ``tie_ends`` of those tensors that hold an element on the cut (None: all ties are kept);
        ``scales`` of the M models.
    """
    keep: list[int] = []

    def ranks(numel: int) -> list[list[int]]:
        keep[:] = [keep_count(numel, d, inclusive=inclusive) for d in density]
        return [[numel - k] if k else [] for k in keep]

    found = select(lambda: ([x.abs() for x in xs] for _, _, xs in sweep(visits)), ranks)
    found = [ranked[0] for ranked in found if ranked]
    if not found:  # a model without elements
        return {
            "thresholds": [0.0] * len(density),
            "tie_ends": None,
            "scales": [1.0] * len(density),
        }
    thresholds = [ranked.value for ranked in found]
    left = [k - ranked.above for k, ranked in zip(keep, found, strict=True)]
    cut_ties = any(n < ranked.equal for n, ranked in zip(left, found, strict=True))
    tie_ends = _tie_ends(visits, thresholds, left) if cut_ties and not inclusive else None
    out = {"thresholds": thresholds, "tie_ends": tie_ends}
    return {**out, "scales": _scales(visits, out, density, rescale)}


def surveyed_thinning(survey: Mapping[str, Any], tensor_name: str, base: Tensor) -> Thinning:
    """Return how ``survey_largest`` decided to thin one tensor."""
    tie_ends = survey["tie_ends"]
    thresholds = survey["thresholds"]
    if tie_ends is None:
        ends = [base.numel()] * len(thresholds)
    else:
        ends = tie_ends.get(tensor_name, [0] * len(thresholds))
    f64 = {"dtype": torch.float64, "device": base.device}
    cuts = torch.tensor(list(zip(thresholds, ends, strict=True)), **f64)
    scales = torch.tensor(survey.get("scales", [1.0] * len(thresholds)), **f64)
    return Thinning("magnitude", cuts, scales)


def _tie_ends(visits: Visits, thresholds: list[float], left: list[int]) -> dict[str, list[int]]:
    """Hand out the places that are ``left`` to elements on the cut, in order."""
    left = list(left)
    ends: dict[str, list[int]] = {}
    seen: set[str] = set()
    for visit, offset, xs in sweep(visits):
        if not any(left):
            break
        if offset == 0 and visit.tensor_name in seen:
            raise ValueError(
                "expected a model whose tensors come once to trim as a whole, "
                f"got {visit.tensor_name!r} again"
            )
        seen.add(visit.tensor_name)
        for m, (x, threshold) in enumerate(zip(xs, thresholds, strict=True)):
            if not left[m]:
                continue
            ties = x.abs() == threshold
            count = int(ties.sum())
            if count == 0:
                continue
            tensor_ends = ends.setdefault(visit.tensor_name, [0] * len(left))
            last = int(ties.nonzero()[min(count, left[m]) - 1])
            tensor_ends[m] = offset + last + 1
            left[m] -= min(count, left[m])
    return ends


def _scales(
    visits: Visits, survey: Mapping[str, Any], density: Sequence[float], rescale: str
) -> list[float]:
    if rescale == "none":
        return [1.0] * len(density)
    if rescale == "inverse_prob":
        return [1 / d for d in density]
    column = NORM_COLUMN[rescale]
    norms = torch.zeros(len(density), 2, dtype=torch.float64)
    for visit in visits():
        cuts = surveyed_thinning(survey, visit.tensor_name, visit.base).selection
        both = masked_norms(visit.base, visit.tensors, cuts, mask="magnitude").cpu()
        both = both[:, [column, 3 + column]]
        if rescale == "linf":
            norms = torch.maximum(norms, both)
        else:
            norms += both**2 if rescale == "l2" else both
    norms = norms.sqrt() if rescale == "l2" else norms
    return norm_scales(norms[:, 0], norms[:, 1]).tolist()

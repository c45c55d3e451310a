"""Fisher merging: a mean in which each element counts as much as its model depends on it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergeme_ext.merging.parameters import Normalize, SmallConstant, Weights
from mergeme_ext.merging.registry import Combine, Scope, merge_method
from mergeme_ext.merging.sweep import (
    Visits,
    block_sum,
    check_surveyed,
    in_parts,
    slices,
    widened,
)


def _survey(visits: Visits, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Find the L2 norm of each model's Fisher over all tensors, if they are to be normalized."""
    if not parameters["normalize"]:
        return {}
    squares = [0.0] * len(parameters["weights"])
    for visit in visits():
        for m, fisher in enumerate(visit.statistics or []):
            if fisher is None:
                continue
            flat = fisher.reshape(-1)
            for part in slices(flat.numel()):  # squares of small numbers leave float32's range
                squares[m] += block_sum(flat[part].double().square())
    return {"parameters": {}, "norms": [math.sqrt(square) for square in squares]}


@merge_method(
    "fisher",
    paper="Matena & Raffel 2022, arXiv:2111.09832",
    scope=Scope.MODEL,
    needs_base=False,
    survey=_survey,
    statistics="fisher",
)
def fisher(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    *,
    weights: Weights = 1.0,
    f0: SmallConstant = 1e-6,
    normalize: Normalize = True,
    tensor_name: str = "",
    survey: Mapping[str, Any] | None = None,
    statistics: Sequence[Tensor | None] = (),
    notes: dict[str, Any] | None = None,
) -> Combine:
    """Merge ``sum_i l_i (F_i + f0) tensors[i] / sum_i l_i (F_i + f0)``, element by element.

    Args:
        base: Not looked at.
        tensors: M weights of one shape.
        weights: M mixing weights l_i; only their ratios matter.
        f0: Added to every element of the Fisher, so that elements on which no model depends get
            the mean; at least 0.
        normalize: Divide each l_i by the L2 norm of model i's Fisher over all tensors, plus ``f0``,
            so that no model wins by the scale of its gradients.
        tensor_name: Name of the tensor; the engine fills it in.
        survey: The engine fills it in; nothing is surveyed without ``normalize``.
        statistics: M diagonal Fishers, each shaped like the weight: the mean over examples of the
            squared gradient of the log likelihood. If no model has one for this tensor, all count
            as zero.
        notes: Says so in that case.

    Raises:
        ValueError: Some models have a Fisher for this tensor and others none, or one has another
            shape than the weight.

    Elements where all Fishers are zero, with ``f0`` zero, get the mean by l_i.
    """
    factors = list(weights)
    if normalize:
        check_surveyed("fisher", survey)
        shares = [1 / (norm + f0) if norm + f0 > 0 else 0.0 for norm in survey["norms"]]
        total = sum(shares)
        if total > 0:
            factors = [w * share / total for w, share in zip(factors, shares, strict=True)]
    if sum(factors) == 0:
        raise ValueError(f"fisher: expected weights with a sum other than 0, got {weights}")
    flat = _flat_statistics(tensor_name, tensors, statistics)
    if flat is None and notes is not None:
        notes["fisher"] = "no statistics: mean by weight"

    def combine(base: Tensor | None, tensors: Sequence[Tensor], offset: int) -> Tensor:
        part = slice(offset, offset + tensors[0].numel())
        wide = widened(tensors)
        above, below, mean = (torch.zeros_like(wide[0]) for _ in range(3))
        for m, (tensor, factor) in enumerate(zip(wide, factors, strict=True)):
            share = factor / sum(factors)
            mean += share * tensor
            if flat is not None:
                scale = factor * (flat[m][part].to(tensor) + f0)
                above += scale * tensor
                below += scale
        return torch.where(below == 0, mean, above / below).to(tensors[0].dtype)

    return in_parts(combine)


def _flat_statistics(
    tensor_name: str, tensors: Sequence[Tensor], statistics: Sequence[Tensor | None]
) -> list[Tensor] | None:
    missing = [m for m, fisher in enumerate(statistics) if fisher is None]
    if len(missing) == len(statistics):
        return None
    if missing:
        raise ValueError(
            f"fisher: expected each model to have statistics of tensor {tensor_name!r}, "
            f"got none from model {missing[0]}"
        )
    for m, fisher in enumerate(statistics):
        if fisher.shape != tensors[0].shape:
            raise ValueError(
                f"fisher: expected statistics of tensor {tensor_name!r} of shape "
                f"{list(tensors[0].shape)}, got {list(fisher.shape)} from model {m}"
            )
    return [fisher.reshape(-1) for fisher in statistics]

"""EMR-Merging: one elected task vector for all, and per task a mask and a factor on it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergeme_ext.merging.parameters import RescaleStat, Task
from mergeme_ext.merging.registry import Combine, Scope, merge_method
from mergeme_ext.merging.sweep import (
    Visits,
    block_sum,
    check_surveyed,
    in_parts,
    sweep,
    task_vectors,
)


def _unify(xs: Sequence[Tensor]) -> Tensor:
    """Return the unified task vector: the largest magnitude of the elected sign.

    The sign is that of the sum; a sum of zero elects minus.
    """
    plus, minus = torch.zeros_like(xs[0]), torch.zeros_like(xs[0])
    most, least = torch.zeros_like(xs[0]), torch.zeros_like(xs[0])
    for x in xs:  # positive and negative values apart, so that what cancels does so exactly
        plus += x.clamp(min=0)
        minus -= x.clamp(max=0)
        torch.maximum(most, x, out=most)
        torch.minimum(least, x, out=least)
    return torch.where(plus > minus, most, least)


def _mask(unified: Tensor, x: Tensor) -> Tensor:
    """Return the unified task vector where ``x`` has its sign, zero elsewhere."""
    return torch.where(unified.sign() * x > 0, unified, 0)


def _survey(visits: Visits, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Find the factor of the task to rebuild."""
    task = parameters["task"]
    if task == "unified":
        return {}
    by_means = parameters["rescale_stat"] == "mean_of_means"
    own = masked = 0.0
    for visit, _, xs in sweep(visits):
        by = visit.base.numel() if by_means else 1
        own += block_sum(xs[task].abs()) / by
        masked += block_sum(_mask(_unify(xs), xs[task]).abs()) / by
    # With a mask that is false everywhere any factor gives the base.
    return {"parameters": dict(parameters), "factor": own / masked if masked else 0.0}


@merge_method(
    "emr_merging",
    paper="Huang et al. 2024, arXiv:2405.17461",
    scope=Scope.MODEL,
    survey=_survey,
)
def emr_merging(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    task: Task = "unified",
    rescale_stat: RescaleStat = "mean_of_means",
    survey: Mapping[str, Any] | None = None,
    notes: dict[str, Any] | None = None,
) -> Combine:
    """Elect a sign per element, take the largest magnitude that has it, mask it for a task.

    With d_i the task vectors, g = +1 where their sum is above zero and -1 elsewhere,
    M_i = [d_i * g > 0] and u = g * max_i |M_i d_i|, the result is ``base + u``, or for task i
    ``base + lam_i * M_i * u`` with lam_i = sum |d_i| / sum |M_i u|.

    Args:
        base: Pretrained weight, any shape.
        tensors: M tuned weights, each shaped like ``base``.
        task: ``unified`` for the unified task vector u, which all tasks share; or a model's place,
            from 0, for the weights that its task would use.
        rescale_stat: What the sums in lam_i go over: the means of all tensors
            (``mean_of_means``), as in the authors' code, or all elements (``global_sum``), as in
            the paper.
        survey: The engine fills it in; nothing is surveyed for ``unified``.
        notes: Gets the task's factor lam_i.
    """
    if task == "unified":

        def combine(base: Tensor, tensors: Sequence[Tensor], offset: int) -> Tensor:
            xs = task_vectors(base, tensors)
            return _unify(xs).add_(base).to(base.dtype)

        return in_parts(combine)
    check_surveyed("emr_merging", survey, task=task, rescale_stat=rescale_stat)
    factor = survey["factor"]
    if notes is not None:
        notes["factor"] = factor

    def combine_task(base: Tensor, tensors: Sequence[Tensor], offset: int) -> Tensor:
        xs = task_vectors(base, tensors)
        return _mask(_unify(xs), xs[task]).mul_(factor).add_(base).to(base.dtype)

    return in_parts(combine_task)

"""Which models changed a place: what RAM and RAM+ share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergeme_ext.merging.sweep import task_vectors

__all__ = ["active_task_vectors"]


def active_task_vectors(
    base: Tensor, tensors: Sequence[Tensor], epsilon: float
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return where each task vector is active, the task vectors with zeros elsewhere, and counts.

    It is active where it is larger than ``epsilon``, or NaN. The counts say how many are at each
    place, in the dtype of arithmetic.
    """
    xs = task_vectors(base, tensors)
    active = [~(x.abs() <= epsilon) for x in xs]
    count = torch.zeros_like(xs[0])
    for a in active:
        count += a
    return active, [torch.where(a, x, 0) for a, x in zip(active, xs, strict=True)], count

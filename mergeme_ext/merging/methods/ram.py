"""RAM: keep what one model alone changed, average what several changed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergeme_ext.merging.overlap import active_task_vectors
from mergeme_ext.merging.parameters import ActiveAbove
from mergeme_ext.merging.registry import Combine, Scope, merge_method
from mergeme_ext.merging.sweep import in_parts


@merge_method("ram", paper="Yuan et al. 2026, arXiv:2601.13572", scope=Scope.ELEMENT)
def ram(base: Tensor, tensors: Sequence[Tensor], *, epsilon: ActiveAbove = 1e-5) -> Combine:
    """Add to the base, at each place, the mean of the changes of the models that changed it.

    Args:
        base: Pretrained weight, any shape.
        tensors: M tuned weights, each shaped like ``base``.
        epsilon: A model has changed a place if it differs from the base by more than this, in the
            unit of the weights.
    """

    def combine(base: Tensor | None, tensors: Sequence[Tensor], offset: int) -> Tensor:
        _, xs, count = active_task_vectors(base, tensors, epsilon)
        mix = torch.zeros_like(count)
        for x in xs:
            mix += x
        return mix.div_(count.clamp_(min=1)).add_(base).to(base.dtype)

    return in_parts(combine)

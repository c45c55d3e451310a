"""RAM: keep what one model alone changed, average what several changed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergeme_ext.merging.chunks import active_deltas, widened
from mergeme_ext.merging.parameters import ActiveAbove
from mergeme_ext.merging.registry import Combine, Scope, merge_method


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
        wide = widened(base)
        mix, count = torch.zeros_like(wide), torch.zeros_like(wide)
        for active, delta in active_deltas(wide, tensors, epsilon):
            mix += delta
            count += active
        return (wide + mix / count.clamp(min=1)).to(base.dtype)

    return combine

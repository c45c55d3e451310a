"""RAM+ per tensor: RAM, with what one model alone changed scaled up by how much it shares."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergeme_ext.merging.overlap import active_task_vectors
from mergeme_ext.merging.parameters import ActiveAbove, UniqueGain, UniqueGainLimit
from mergeme_ext.merging.registry import Combine, Scope, merge_method
from mergeme_ext.merging.sweep import in_parts, slices


@merge_method("ramplus_tl", paper="Yuan et al. 2026, arXiv:2601.13572", scope=Scope.TENSOR)
def ramplus_tl(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    epsilon: ActiveAbove = 1e-5,
    r: UniqueGain = 0.1,
    alpha: UniqueGainLimit = 0.2,
    notes: dict | None = None,
) -> Combine:
    """Merge as ``ram`` does, but scale what model i alone changed by 1 + r * min(rho_i, alpha).

    rho_i is the number of places of this tensor that model i and others changed, over the number
    that it alone changed.

    Args:
        base: Pretrained weight, any shape.
        tensors: M tuned weights, each shaped like ``base``.
        epsilon: As in ``ram``; also the least divisor of rho.
        r: Strength of the scaling.
        alpha: Where rho is cut off.
        notes: Gets the scales; the engine fills it in.
    """
    shared, unique = _overlaps(base, tensors, epsilon)
    divisors = [max(float(u), epsilon) for u in unique]
    rho = [s / d if d else 0.0 for s, d in zip(shared, divisors, strict=True)]
    scales = [1 + r * min(x, alpha) for x in rho]
    if notes is not None:
        notes["scales"] = scales

    def combine(base: Tensor | None, tensors: Sequence[Tensor], offset: int) -> Tensor:
        _, xs, count = active_task_vectors(base, tensors, epsilon)
        mix, alone = torch.zeros_like(count), torch.zeros_like(count)
        for scale, x in zip(scales, xs, strict=True):
            mix += x
            alone += scale * x
        mix = torch.where(count == 1, alone, mix.div_(count.clamp(min=1)))
        return mix.add_(base).to(base.dtype)

    return in_parts(combine)


def _overlaps(
    base: Tensor, tensors: Sequence[Tensor], epsilon: float
) -> tuple[list[int], list[int]]:
    """For each model: the places it changed with others, and those it alone changed."""
    flat, models = base.reshape(-1), [t.reshape(-1) for t in tensors]
    shared, unique = [0] * len(models), [0] * len(models)
    for part in slices(flat.numel()):
        active, _, count = active_task_vectors(flat[part], [m[part] for m in models], epsilon)
        alone = count == 1
        for i, a in enumerate(active):
            own = int((a & alone).count_nonzero())
            unique[i] += own
            shared[i] += int(a.count_nonzero()) - own
    return shared, unique

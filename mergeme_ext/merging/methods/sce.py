"""SCE: select where models vary most, weigh models by their energy there, erase minority signs."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mergeme_ext.merging.parameters import SelectTopk, UniformBelow
from mergeme_ext.merging.registry import Combine, Scope, merge_method
from mergeme_ext.merging.select import select
from mergeme_ext.merging.sweep import block_sum, in_parts, slices, widened
from mergeme_ext.ops import masked_norms, merge_task_vectors

# Sums of mean squares below these weigh nothing: absolute, or as a share of the base's.
_SMALLEST_TOTAL = 1e-6
_SMALLEST_SHARE = 1e-12


@merge_method("sce", paper="Wan et al. 2024, arXiv:2408.07990", scope=Scope.TENSOR)
def sce(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    select_topk: SelectTopk = 1.0,
    uniform_below: UniformBelow = "absolute",
    notes: dict | None = None,
) -> Combine:
    """Select, calculate, erase.

    Args:
        base: Pretrained weight, any shape.
        tensors: M tuned weights, each shaped like ``base``.
        select_topk: Fraction tau in [0, 1] of the places kept, those where the M task vectors vary
            most: floor(tau * c) of the c places where they vary at all; of equal variances, the
            lower index. 1 keeps every place.
        uniform_below: A model weighs as its mean square change over the tensor, counting what is
            kept. Where the sum of these is below 1e-6 (``absolute``) all models weigh the same;
            ordinary fine-tuning can fall below that. ``relative``: where it is below 1e-12 of the
            base's mean square.
        notes: Gets ``weights``, and ``uniform`` if they are all the same for that reason; the
            engine fills it in.

    At each place the sign of the plain sum is elected, a tie electing plus. The result is the base
    plus the weighted mean of the changes that agree.

    Departs from mergekit's: the mean's divisor has no floor of 1e-6, which would shrink changes
    where only models agree that weigh less than that.
    """
    kept = _Kept(tensors, select_topk)
    squares = _mean_squares(base, tensors, kept)
    floor = _SMALLEST_TOTAL
    if uniform_below == "relative":
        parts = (widened([base.reshape(-1)[part]])[0] for part in slices(base.numel()))
        energy = sum((block_sum(part * part) for part in parts), 0.0)
        floor = _SMALLEST_SHARE * energy / max(1, base.numel())
    total = sum(squares)
    uniform = total < floor or total == 0
    weights = [1 / len(squares) if uniform else s / total for s in squares]
    if notes is not None:
        notes["weights"] = weights
        if uniform:
            notes["uniform"] = True

    f64 = {"dtype": torch.float64, "device": base.device}
    w, ones = torch.tensor(weights, **f64), torch.ones(len(weights), **f64)
    selection = torch.zeros(len(weights), 2, **f64)

    def combine(base: Tensor | None, tensors: Sequence[Tensor], offset: int) -> Tensor:
        moved = kept.others_reset(base, tensors, offset)
        return merge_task_vectors(
            base, moved, w, ones, selection, elect="unweighted", normalize=True
        )

    return in_parts(combine)


class _Kept:
    """The places kept: those varying by more than a value, or by just that before ``tie_end``."""

    def __init__(self, tensors: Sequence[Tensor], fraction: float) -> None:
        self.value, self.tie_end = float("inf"), 0  # nothing
        self.everything = fraction == 1
        numel, varying, keep = tensors[0].numel(), 0, 0
        if self.everything or numel == 0:
            return
        flat = [t.reshape(-1) for t in tensors]

        def variances() -> Iterator[list[Tensor]]:
            nonlocal varying
            varying = 0
            for part in slices(numel):
                variance = _variance(widened([t[part] for t in flat]))
                varying += int(variance.count_nonzero())
                yield [variance]

        def ranks(numel: int) -> list[list[int]]:  # called when the first round is over
            nonlocal keep
            keep = int(fraction * varying)
            return [[numel - keep] if keep else []]

        (found,) = select(variances, ranks)
        if not found:
            return
        self.value, self.tie_end = found[0].value, numel
        left = keep - found[0].above
        if left < found[0].equal:
            for part, (v,) in zip(slices(numel), variances(), strict=True):
                ties = (v == self.value).nonzero().squeeze(1)
                if left <= len(ties):
                    self.tie_end = part.start + int(ties[left - 1]) + 1
                    break
                left -= len(ties)

    def others_reset(
        self, base: Tensor, tensors: Sequence[Tensor], offset: int
    ) -> Sequence[Tensor]:
        """Return stretches of ``tensors``, with the base's elements at the places not kept."""
        if self.everything:
            return tensors
        variance = _variance(widened(tensors))
        dropped = variance < self.value
        ties = min(max(self.tie_end - offset, 0), len(dropped))
        dropped[ties:] |= variance[ties:] == self.value
        return [torch.where(dropped, base, t) for t in tensors]


def _variance(tensors: Sequence[Tensor]) -> Tensor:
    """Return the population variance at each place, exactly zero where all are equal.

    Taken of differences to the first: a shift changes no variance, so the base doesn't matter.
    """
    first, *others = tensors
    shifted = [t - first for t in others]
    mean = torch.zeros_like(first)
    for s in shifted:
        mean += s
    mean /= len(tensors)
    out = mean * mean  # of the first
    for s in shifted:
        out += s.sub_(mean).square_()
    return out.div_(len(tensors))


def _mean_squares(base: Tensor, tensors: Sequence[Tensor], kept: _Kept) -> list[float]:
    flat, models = base.reshape(-1), [t.reshape(-1) for t in tensors]
    nothing = torch.zeros(len(models), 2, dtype=torch.float64, device=base.device)
    sums = nothing[:, 0].clone()
    for part in slices(flat.numel()):
        moved = kept.others_reset(flat[part], [m[part] for m in models], part.start)
        sums += masked_norms(flat[part], moved, nothing)[:, 1] ** 2
    return (sums / max(1, flat.numel())).tolist()

"""SCE: select where models vary most, weigh models by their energy there, erase minority signs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergeme_ext.merging.chunks import widened
from mergeme_ext.merging.parameters import SelectTopk, UniformBelow
from mergeme_ext.merging.registry import Combine, Scope, merge_method
from mergeme_ext.merging.select import Cut, blocks, rank_cuts
from mergeme_ext.ops import masked_norms

_SMALLEST_TOTAL = 1e-6
_SMALLEST_SHARE_OF_BASE = 1e-12
_SMALLEST_DIVISOR = 1e-6


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
            most: floor(tau * c) of the c places with a variance other than zero; of equal variances
            the lower index. 1 keeps every place, c places or not.
        uniform_below: Each model weighs as its mean square change at the places kept. Where the sum
            of these is below 1e-6 (``absolute``), all weigh the same; ordinary fine-tuning falls
            below that. ``relative`` does so below 1e-12 of the base's mean square only.
        notes: Gets ``weights``, and ``uniform`` where they are the same; the engine fills it in.

    At each place the sign of the unweighted sum is elected, a tie electing plus. The result is the
    base plus the weighted mean of the changes that agree; divisors below 1e-6 count as that.
    """
    selection = _Selection(tensors, select_topk)
    squares = _mean_squares(base, tensors, selection)
    floor = _SMALLEST_TOTAL
    if uniform_below == "relative":
        floor = _SMALLEST_SHARE_OF_BASE * _mean_square(base)
    total = sum(squares)
    uniform = total < floor or total == 0
    weights = [1 / len(squares) if uniform else s / total for s in squares]
    if notes is not None:
        notes["weights"] = weights
        if uniform:
            notes["uniform"] = True

    def combine(base: Tensor | None, tensors: Sequence[Tensor], offset: int) -> Tensor:
        wide = widened(base)
        deltas = selection.deltas(wide, tensors, offset)
        total = torch.zeros_like(wide)
        for delta in deltas:
            total += delta
        sign = torch.where(total < 0, -1.0, 1.0)
        mix, divisor = torch.zeros_like(wide), torch.zeros_like(wide)
        for weight, delta in zip(weights, deltas, strict=True):
            agrees = ~(delta * sign <= 0)  # a NaN agrees, and so shows
            mix += torch.where(agrees, weight * delta, 0)
            divisor += weight * agrees.to(wide.dtype)
        return (wide + mix / divisor.clamp(min=_SMALLEST_DIVISOR)).to(base.dtype)

    return combine


class _Selection:
    """The places kept; everything at a ``fraction`` of 1."""

    def __init__(self, tensors: Sequence[Tensor], fraction: float) -> None:
        self.whole = fraction == 1
        self.cut: Cut | None = None
        if self.whole:
            return
        flat = [t.reshape(-1) for t in tensors]

        def score(begin: int, end: int) -> Tensor:
            return _variance([widened(t[begin:end]) for t in flat])

        def ranks(nonzero: int) -> list[int]:
            keep = int(fraction * nonzero)
            return [keep] if keep else []

        cuts = rank_cuts(score, flat[0].numel(), ranks)
        self.cut = cuts[0] if cuts else None

    def deltas(self, base: Tensor, tensors: Sequence[Tensor], offset: int) -> list[Tensor]:
        """The task vectors of a stretch, zero where nothing is kept; ``base`` is widened."""
        wide = [widened(t) for t in tensors]
        if self.whole:
            return [t - base for t in wide]
        if self.cut is None:
            return [torch.zeros_like(base) for _ in wide]
        kept = self.cut.keeps(_variance(wide), offset)
        return [torch.where(kept, t - base, 0) for t in wide]


def _variance(tensors: Sequence[Tensor]) -> Tensor:
    """Population variance at each place; taken from the first, so that equal ones have none.

    The base need not be subtracted: a shift changes no variance.
    """
    first, *others = tensors
    shifted = [torch.zeros_like(first), *(t - first for t in others)]
    mean = torch.zeros_like(first)
    for s in shifted:
        mean += s
    mean /= len(shifted)
    out = torch.zeros_like(first)
    for s in shifted:
        deviation = s - mean
        out += deviation * deviation
    return out / len(shifted)


def _mean_square(tensor: Tensor) -> float:
    nothing = torch.zeros(1, 2, dtype=torch.float64, device=tensor.device)
    flat, total = tensor.reshape(-1), 0.0
    for begin, end in blocks(flat.numel()):
        stretch = flat[begin:end]
        total += masked_norms(torch.zeros_like(stretch), [stretch], nothing)[0, 1].item() ** 2
    return total / max(1, flat.numel())


def _mean_squares(base: Tensor, tensors: Sequence[Tensor], selection: _Selection) -> list[float]:
    every = torch.zeros(len(tensors), 2, dtype=torch.float64, device=base.device)
    if selection.whole:
        sums = masked_norms(base, tensors, every)[:, 1] ** 2
    else:
        sums = every[:, 0].clone()
        flat, models = base.reshape(-1), [t.reshape(-1) for t in tensors]
        for begin, end in blocks(flat.numel()):
            stretch = widened(flat[begin:end])
            deltas = selection.deltas(stretch, [m[begin:end] for m in models], begin)
            sums += masked_norms(torch.zeros_like(stretch), deltas, every)[:, 1] ** 2
    return (sums / max(1, base.numel())).tolist()

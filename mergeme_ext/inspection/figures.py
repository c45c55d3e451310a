"""Sums over task vectors that add up over tensors, and the figures derived from them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["BLOCK", "Figures", "measure", "pairs_of"]

# Sums are formed over blocks of this many elements, then over blocks in index order.
BLOCK = 4096


def pairs_of(num_models: int) -> list[tuple[int, int]]:
    """Return all pairs of models, as (0, 1), (0, 2), ..., (1, 2), ..."""
    return [(i, j) for i in range(num_models) for j in range(i + 1, num_models)]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


@dataclass(frozen=True)
class Figures:
    """What is known of M task vectors x over some set of elements; ``a + b`` is that of both sets.

    A task vector is a model's weights minus the base's; without a base, the weights themselves.
    Elements where the base or a model is not finite count in ``numel`` and ``non_finite`` only.

    Attributes:
        numel: Number of elements.
        usable: Number of elements that are finite in the base and in all models.
        base_square: Sum of squares of the base (0 without one).
        gram: Inner products <x_i, x_j>, M rows of M.
        l1: Sum of magnitudes of each x.
        linf: Largest magnitude in each x.
        changed: How many elements of each x are not zero.
        contested: How many positions at least two x change; ``conflicts``: and not with one sign.
        pair_contested, pair_conflicts: The same of each pair of models alone.
        non_finite: Elements that are NaN or infinite, of the base (0 without one), then each model.
    """

    numel: int
    usable: int
    base_square: float
    gram: tuple[tuple[float, ...], ...]
    l1: tuple[float, ...]
    linf: tuple[float, ...]
    changed: tuple[int, ...]
    contested: int
    conflicts: int
    pair_contested: tuple[int, ...]
    pair_conflicts: tuple[int, ...]
    non_finite: tuple[int, ...]

    @classmethod
    def zero(cls, num_models: int) -> "Figures":
        """Return the figures of no element."""
        none, pairs = (0,) * num_models, (0,) * len(pairs_of(num_models))
        gram = ((0.0,) * num_models,) * num_models
        nothing = (0.0,) * num_models
        return cls(0, 0, 0.0, gram, nothing, nothing, none, 0, 0, pairs, pairs, (0, *none))

    def __add__(self, other: "Figures") -> "Figures":
        def add(a: tuple, b: tuple) -> tuple:
            return tuple(x + y for x, y in zip(a, b, strict=True))

        return Figures(
            self.numel + other.numel,
            self.usable + other.usable,
            self.base_square + other.base_square,
            tuple(add(a, b) for a, b in zip(self.gram, other.gram, strict=True)),
            add(self.l1, other.l1),
            tuple(max(a, b) for a, b in zip(self.linf, other.linf, strict=True)),
            add(self.changed, other.changed),
            self.contested + other.contested,
            self.conflicts + other.conflicts,
            add(self.pair_contested, other.pair_contested),
            add(self.pair_conflicts, other.pair_conflicts),
            add(self.non_finite, other.non_finite),
        )

    @property
    def num_models(self) -> int:
        """Number of models, M."""
        return len(self.l1)

    @property
    def l2(self) -> tuple[float, ...]:
        """Euclidean norm of each x."""
        return tuple(math.sqrt(self.gram[m][m]) for m in range(self.num_models))

    @property
    def relative_norm(self) -> tuple[float, ...]:
        """||x|| / ||base|| of each model; NaN where the base is zero, or there is none."""
        return tuple(_ratio(norm, math.sqrt(self.base_square)) for norm in self.l2)

    @property
    def unchanged(self) -> tuple[float, ...]:
        """Share in [0, 1] of elements where x is exactly zero, of each model."""
        return tuple(1 - _ratio(n, self.usable) for n in self.changed)

    @property
    def cosine(self) -> tuple[float, ...]:
        """Cosine between the task vectors of each pair, in [-1, 1]; NaN where one is zero."""
        norms = self.l2
        return tuple(
            max(-1.0, min(1.0, _ratio(self.gram[i][j], norms[i] * norms[j])))
            if norms[i] * norms[j] > 0
            else math.nan
            for i, j in pairs_of(self.num_models)
        )

    @property
    def sign_conflict(self) -> float:
        """Share in [0, 1] of contested positions where the models disagree in sign."""
        return _ratio(self.conflicts, self.contested)

    @property
    def pair_sign_conflict(self) -> tuple[float, ...]:
        """The same of each pair of models alone."""
        pairs = zip(self.pair_conflicts, self.pair_contested, strict=True)
        return tuple(_ratio(conflicts, contested) for conflicts, contested in pairs)

    def document(self) -> dict[str, Any]:
        """Return all figures as JSON holds them: NaN as None, lists by model and by pair."""

        def listed(values: tuple[float, ...]) -> list[float | None]:
            return [v if math.isfinite(v) else None for v in values]

        return {
            "numel": self.numel,
            "usable": self.usable,
            "cosine": listed(self.cosine),
            "sign_conflict": listed((self.sign_conflict,))[0],
            "pair_sign_conflict": listed(self.pair_sign_conflict),
            "relative_norm": listed(self.relative_norm),
            "l1": listed(self.l1),
            "l2": listed(self.l2),
            "linf": listed(self.linf),
            "unchanged": listed(self.unchanged),
            "base_l2": math.sqrt(self.base_square),
            "contested": self.contested,
            "non_finite": list(self.non_finite),
        }


def measure(base: Tensor | None, tensors: Sequence[Tensor]) -> Figures:
    """Return the figures of a chunk.

    Args:
        base: ``[n]``, any floating dtype; None to measure the weights themselves.
        tensors: M chunks like ``base``.

    Differences and products are formed in float64. Each sum is taken over blocks of BLOCK elements
    and the blocks' sums are added exactly, so that no thread changes a bit; cut tensors at
    multiples of BLOCK.
    """
    deltas = [t.double() for t in tensors]
    wide_base = None if base is None else base.double()
    if wide_base is not None:
        deltas = [delta - wide_base for delta in deltas]
    figures = _sums(wide_base, deltas)
    if all(math.isfinite(figures.gram[m][m]) for m in range(len(deltas))):
        return figures
    # Only now is it worth to look at every element.
    inputs = [*tensors] if base is None else [base, *tensors]
    finite = [torch.isfinite(t) for t in inputs]
    usable = torch.stack(finite).all(dim=0)
    deltas = [torch.where(usable, d, 0.0) for d in deltas]
    wide_base = None if wide_base is None else torch.where(usable, wide_base, 0.0)
    counts = tuple(f.numel() - int(torch.count_nonzero(f)) for f in finite)
    return replace(
        _sums(wide_base, deltas),
        usable=_count(usable),
        non_finite=(0, *counts) if base is None else counts,
    )


def _sums(base: Tensor | None, deltas: Sequence[Tensor]) -> Figures:
    num_models = len(deltas)
    gram = [[0.0] * num_models for _ in range(num_models)]
    for m, delta in enumerate(deltas):
        gram[m][m] = _sum(delta * delta)
    contested, conflicts = None, None
    pair_contested, pair_conflicts = [], []
    for i, j in pairs_of(num_models):
        product = deltas[i] * deltas[j]
        gram[i][j] = gram[j][i] = _sum(product)
        # Products of deltas vanish below 1e-160 only, far below any half or single precision.
        both, against = product != 0, product < 0
        pair_contested.append(_count(both))
        pair_conflicts.append(_count(against))
        contested = both if contested is None else contested.logical_or_(both)
        conflicts = against if conflicts is None else conflicts.logical_or_(against)
    magnitudes = [delta.abs() for delta in deltas]
    return Figures(
        numel=deltas[0].numel(),
        usable=deltas[0].numel(),
        base_square=0.0 if base is None else _sum(base * base),
        gram=tuple(map(tuple, gram)),
        l1=tuple(_sum(a) for a in magnitudes),
        linf=tuple(float(a.amax()) if a.numel() else 0.0 for a in magnitudes),
        changed=tuple(_count(delta) for delta in deltas),
        contested=_count(contested),
        conflicts=_count(conflicts),
        pair_contested=tuple(pair_contested),
        pair_conflicts=tuple(pair_conflicts),
        non_finite=(0,) * (num_models + 1),
    )


def _sum(values: Tensor) -> float:
    whole = values.numel() // BLOCK * BLOCK
    blocks = values[:whole].view(-1, BLOCK).sum(dim=1).tolist()
    return math.fsum([*blocks, float(values[whole:].sum())])


def _count(values: Tensor | None) -> int:
    return 0 if values is None else int(torch.count_nonzero(values))

"""Arcee Fusion: take over a model's most important changes, judged by size and divergence."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mergeme_ext.merging.registry import Combine, Scope, merge_method
from mergeme_ext.merging.select import select
from mergeme_ext.merging.sweep import SWEEP_ELEMENTS, in_parts, slices, task_vectors

_SMALLEST_SHARE = 1e-8


@merge_method(
    "arcee_fusion",
    paper="Arcee AI 2025, in mergekit (no paper)",
    scope=Scope.TENSOR,
    num_models=(1, 1),
)
def arcee_fusion(base: Tensor, tensors: Sequence[Tensor], *, notes: dict | None = None) -> Combine:
    """Take each element of the model whose importance is far above the median, else the base's.

    The importance of an element is its distance to the base times the Kullback-Leibler divergence
    of its row, taken as softmax scores (plus 1e-8), from the base's row. An element is taken over
    if its importance reaches median + 1.5 * (third quartile - first quartile); the quantile f of n
    sorted numbers is number floor(f * (n - 1)), from 0. A NaN is taken over.

    Args:
        base: Weight of the model that is kept, any shape; a row is the last dimension.
        tensors: One weight shaped like it.
        notes: Gets the threshold, as ``importance``; the engine fills it in.

    If three quarters of a tensor are unchanged, the threshold is 0 and the whole model is taken.

    Departs from mergekit's: quantiles are exact for large tensors too, rather than of a random
    sample; divergences are summed in float64.
    """
    length = max(1, base.shape[-1] if base.dim() else 1)
    x, y = base.reshape(-1), tensors[0].reshape(-1)
    divergence = _divergences(x, y, length)
    if len(divergence) == 1:
        # Changes of a few steps of a coarse type are small multiples of one number, and many lie on
        # the threshold. Widened, the products of two float32 numbers are exact, and those reach it.
        divergence = divergence.double()
    threshold = _threshold(x, y, divergence, length)
    if notes is not None:
        notes["importance"] = threshold

    def combine(base: Tensor | None, tensors: Sequence[Tensor], offset: int) -> Tensor:
        scores = _importance(base, tensors[0], divergence, offset, length)
        return torch.where(~(scores.double() < threshold), tensors[0], base)

    return in_parts(combine)


def _divergences(x: Tensor, y: Tensor, length: int) -> Tensor:
    """The divergence of each row, in the accumulation type."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.empty(x.numel() // length, dtype=dtype, device=x.device)
    for rows in slices(len(out), max(1, SWEEP_ELEMENTS // length)):
        part = slice(rows.start * length, rows.stop * length)
        q, p = (t[part].view(-1, length).double().softmax(-1) + _SMALLEST_SHARE for t in (x, y))
        terms = p * (p.log() - q.log())
        while terms.shape[1] > 1:  # folded in halves: the same bits whatever the threads
            half = (terms.shape[1] + 1) // 2
            terms[:, : terms.shape[1] - half] += terms[:, half:]
            terms = terms[:, :half]
        out[rows] = terms[:, 0]
    return out


def _importance(x: Tensor, y: Tensor, divergence: Tensor, begin: int, length: int) -> Tensor:
    """Importances of a flat stretch from element ``begin`` on."""
    first, last = begin // length, math.ceil((begin + x.numel()) / length)
    rows = divergence[first:last].repeat_interleave(length)
    return task_vectors(x, [y])[0].abs_() * rows[begin - first * length :][: x.numel()]


def _threshold(x: Tensor, y: Tensor, divergence: Tensor, length: int) -> float:
    def scores():
        for part in slices(x.numel()):
            yield [_importance(x[part], y[part], divergence, part.start, length)]

    def quartiles(numel: int) -> list[list[int]]:
        return [[int(f * (numel - 1)) for f in (0.25, 0.5, 0.75)]]

    if x.numel() == 0:
        return 0.0
    ((first, median, third),) = select(scores, quartiles)
    return median.value + 1.5 * (third.value - first.value)

"""Exact order statistics of scores that are only ever seen chunk by chunk."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Ranked", "select"]

# A round narrows every sought value down by so many bits of its key: two rounds for float32, four
# for float64. A histogram takes half a MiB.
_DIGIT_BITS = 16
_BINS = 1 << _DIGIT_BITS


@dataclass(frozen=True)
class Ranked:
    """One order statistic: its value, and how many scores are below, equal and above it."""

    value: float
    below: int
    equal: int
    above: int


def select(
    scores: Callable[[], Iterable[Sequence[Tensor]]],
    ranks: Callable[[int], Sequence[Sequence[int]]],
) -> list[list[Ranked]]:
    """Return exact order statistics of M rows of scores, in bounded memory.

    Args:
        scores: Starts a round over all scores: yields chunks, each of M flat tensors of one length,
            float32 or float64. Every round must yield the same values. There are two rounds; if
            any score is float64, four more, in which all count as float64.
        ranks: Called with N, the number of scores in a row, it returns for each row the ranks to
            find, in [0, N); rank 0 is the smallest.

    Returns:
        For each row, one ``Ranked`` for each rank. NaN ranks above infinity (below minus infinity
        if its sign bit is set), and -0 right below +0.

    Raises:
        IndexError: A rank is not in [0, N).

    Source: radix selection, most significant digit first.
    """
    found = _rounds(scores, ranks, torch.float32)
    return _rounds(scores, ranks, torch.float64) if found is None else found


@dataclass
class _Search:
    """Looks for one rank of one row: the digits found so far, and the scores below them."""

    rank: int
    prefix: int = 0
    below: int = 0
    equal: int = 0


def _rounds(scores, ranks, dtype: torch.dtype) -> list[list[Ranked]] | None:
    """Return what ``select`` does, with keys of ``dtype``; None if that is too narrow."""
    bits = torch.finfo(dtype).bits
    searches: list[list[_Search]] = []
    for shift in range(bits - _DIGIT_BITS, -1, -_DIGIT_BITS):
        first = shift == bits - _DIGIT_BITS
        histograms: dict[tuple[int, int], Tensor] = {}
        for row, search in ((row, s) for row, found in enumerate(searches) for s in found):
            histograms[row, search.prefix] = torch.zeros(_BINS, dtype=torch.int64)
        total = 0
        for chunk in scores():
            total += chunk[0].numel() if chunk else 0
            for row, values in enumerate(chunk):
                if values.dtype == torch.float64 != dtype:
                    return None
                keys = _keys(values.to(dtype))
                if first:
                    counts = torch.bincount((keys >> shift).add_(_BINS // 2), minlength=_BINS).cpu()
                    histograms[row, 0] = histograms.get((row, 0), 0) + counts
                    continue
                high = keys >> (shift + _DIGIT_BITS)
                for prefix in {s.prefix for s in searches[row]}:
                    part = keys[high == prefix]
                    digits = (part >> shift) & (_BINS - 1)
                    histograms[row, prefix] += torch.bincount(digits, minlength=_BINS).cpu()
        if first:
            searches = [[_Search(rank) for rank in row] for row in ranks(total)]
            if wrong := [s.rank for found in searches for s in found if not 0 <= s.rank < total]:
                raise IndexError(f"expected ranks in [0, {total}), got {wrong[0]}")
        upto = {place: counts.cumsum(0) for place, counts in histograms.items()}
        for row, found in enumerate(searches):
            for search in found:
                counts, sums = histograms[row, search.prefix], upto[row, search.prefix]
                at = int(torch.searchsorted(sums, search.rank - search.below, right=True))
                search.equal = int(counts[at])
                search.below += int(sums[at]) - search.equal
                search.prefix = at - _BINS // 2 if first else (search.prefix << _DIGIT_BITS) | at
    return [
        [
            Ranked(_value(s.prefix, dtype), s.below, s.equal, total - s.below - s.equal)
            for s in found
        ]
        for found in searches
    ]


def _flip(keys: Tensor) -> Tensor:
    """Turn a float's bits into an integer that orders like it, or back."""
    integer = torch.iinfo(keys.dtype)
    return (keys >> (integer.bits - 1)).bitwise_and_(integer.max).bitwise_xor_(keys)


def _keys(values: Tensor) -> Tensor:
    integer = torch.int64 if values.dtype == torch.float64 else torch.int32
    return _flip(values.contiguous().view(integer))


def _value(key: int, dtype: torch.dtype) -> float:
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    return _flip(torch.tensor([key], dtype=integer)).view(dtype).item()

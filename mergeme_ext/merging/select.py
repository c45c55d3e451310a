"""Exact order statistics of a score that is computed stretch by stretch and never stored."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["BLOCK", "COLLECT", "Cut", "blocks", "rank_cuts"]

# Elements looked at in one go, and members worth collecting rather than counting once more.
BLOCK = 2**20
COLLECT = 2**21
_DIGIT = 16

# (begin, end) -> the scores of elements [begin, end), flat; float32 or float64.
Score = Callable[[int, int], Tensor]


def blocks(numel: int, step: int = BLOCK) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of one stretch after another of ``numel`` elements."""
    for begin in range(0, numel, step):
        yield begin, min(begin + step, numel)


@dataclass(frozen=True)
class Cut:
    """The score of a rank, and where among equal scores the ranks up to it end.

    Attributes:
        value: The score.
        tie_end: Elements that score ``value`` are among the largest up to the rank iff their index
            is lower than this.
    """

    value: float
    tie_end: int

    def keeps(self, scores: Tensor, begin: int) -> Tensor:
        """Return which of the elements from index ``begin`` on are of this rank or above."""
        if self.value != self.value:
            equal, above = scores.isnan(), torch.zeros_like(scores, dtype=torch.bool)
        else:
            equal, above = scores == self.value, ~(scores <= self.value)
        ties = min(max(self.tie_end - begin, 0), scores.numel())
        equal[ties:] = False
        return above | equal


@dataclass(frozen=True)
class _Search:
    """A rank among its members: the elements whose keys begin with ``prefix``."""

    place: int  # in the list of ranks asked for
    rank: int
    members: int
    prefix: int = 0

    def narrowed(self, counts: Tensor, base: int) -> "_Search":
        """Add to the prefix the digit that the rank falls on; digit d of ``counts`` is base + d."""
        down = counts.flip(0).cumsum(0)
        step = int(torch.searchsorted(down, self.rank))
        digit = len(counts) - 1 - step
        rank = self.rank - (int(down[step - 1]) if step else 0)
        return replace(self, rank=rank, members=int(counts[digit]), prefix=base + digit)


def rank_cuts(
    score: Score,
    numel: int,
    ranks: Sequence[int] | Callable[[int], Sequence[int]],
    *,
    block: int = BLOCK,
    collect: int = COLLECT,
) -> list[Cut]:
    """Return the cut at each of ``ranks``, exactly, in two sweeps over the score, rarely more.

    The first sweep counts the scores by their leading 16 bits, which leaves few elements that a
    rank may fall on; the second collects these. Where they are still many, as when most scores are
    equal, further digits are counted, and at last ties are located by counting.

    Args:
        score: Called for all elements in order, once in each sweep.
        numel: Number of elements.
        ranks: Each in [1, numel], 1 being the largest score; or a function that returns them from
            the number of scores other than zero. Of equal scores the lower index comes first; NaN
            counts as larger than infinity.
        block: Elements asked for in one go. No cut depends on it.
        collect: Members of a search worth collecting. No cut depends on it.
    """
    bins = 2**_DIGIT
    counts, nonzero, bits = torch.zeros(bins, dtype=torch.int64), 0, _DIGIT
    for begin, end in blocks(numel, block):
        scores = score(begin, end)
        nonzero += int(scores.count_nonzero())
        bits = 8 * scores.element_size()
        counts += _count((_keys(scores) >> (bits - _DIGIT)) + bins // 2, bins)
    wanted = ranks(nonzero) if callable(ranks) else ranks
    if outside := [rank for rank in wanted if not 1 <= rank <= numel]:
        raise ValueError(f"expected ranks in [1, {numel}], got {outside[0]}")
    searches = [_Search(i, rank, numel) for i, rank in enumerate(wanted)]
    searches = [s.narrowed(counts, -bins // 2) for s in searches]
    cuts: dict[int, Cut] = {}
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        if not searches:
            break
        small = [s for s in searches if s.members <= collect]
        large = [s for s in searches if s.members > collect]
        found = {s.prefix: [] for s in small}
        digits = {s.prefix: torch.zeros(bins, dtype=torch.int64) for s in large}
        ties = {s.place: s.rank for s in large}
        for begin, end in blocks(numel, block):
            keys = _keys(score(begin, end))
            heads = keys >> shift
            for prefix, members in found.items():
                places = (heads == prefix).nonzero().squeeze(1)
                members.append((keys[places].cpu(), places.cpu() + begin))
            if shift:
                for prefix, total in digits.items():
                    total += _count((keys[heads == prefix] >> (shift - _DIGIT)) & (bins - 1), bins)
                continue
            for s in large:  # all members are equal: the tie ends after the rank-th
                if s.place not in cuts:
                    places = (keys == s.prefix).nonzero().squeeze(1)
                    if ties[s.place] <= len(places):
                        last = int(places[ties[s.place] - 1]) + begin
                        cuts[s.place] = Cut(_score_of(s.prefix, bits), last + 1)
                    ties[s.place] -= len(places)
        for s in small:
            keys, places = (torch.cat(parts) for parts in zip(*found[s.prefix], strict=True))
            order = torch.sort(keys, descending=True, stable=True).indices
            last = order[s.rank - 1]
            cuts[s.place] = Cut(_score_of(int(keys[last]), bits), int(places[last]) + 1)
        searches = [s.narrowed(digits[s.prefix], s.prefix << _DIGIT) for s in large if shift]
    return [cuts[i] for i in range(len(wanted))]


def _count(digits: Tensor, bins: int) -> Tensor:
    return torch.bincount(digits, minlength=bins).cpu()


def _keys(scores: Tensor) -> Tensor:
    """Return integers in the order of the scores: zeros are equal, and NaNs the largest."""
    wide = scores.dtype == torch.float64
    integer, sign = (torch.int64, 63) if wide else (torch.int32, 31)
    bits = (scores + 0.0).view(integer)  # -0 becomes +0
    most = 2**sign - 1
    return torch.where(scores.isnan(), most, bits ^ ((bits >> sign) & most))


def _score_of(key: int, bits: int) -> float:
    integer, dtype = (torch.int64, torch.float64) if bits == 64 else (torch.int32, torch.float32)
    key = key if key >= 0 else key ^ (2 ** (bits - 1) - 1)
    return torch.tensor(key, dtype=integer).view(dtype).item()

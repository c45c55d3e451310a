import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeme_ext.merging.select import Cut, rank_cuts

DTYPES = [torch.float32, torch.float64]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 1e-45, -1e-45, 1.5, -1.5]


def expected_cuts(scores, ranks):
    values = scores.tolist()
    nan = [math.isnan(v) for v in values]
    order = sorted(range(len(values)), key=lambda i: (not nan[i], 0 if nan[i] else -values[i], i))
    return [Cut(values[order[r - 1]], order[r - 1] + 1) for r in ranks], order


def check(scores, ranks, **options):
    n = len(scores)
    cuts = rank_cuts(lambda a, b: scores[a:b], n, ranks, **options)
    expected, order = expected_cuts(scores, ranks)
    for cut, want, rank in zip(cuts, expected, ranks, strict=True):
        assert cut.tie_end == want.tie_end
        assert cut.value == want.value or (math.isnan(cut.value) and math.isnan(want.value))
        halves = [(0, n // 3), (n // 3, n)]
        kept = torch.cat([cut.keeps(scores[a:b], a) for a, b in halves])
        assert sorted(kept.nonzero().flatten().tolist()) == sorted(order[:rank])


@settings(max_examples=150)
@given(
    data=st.data(),
    n=st.integers(1, 80),
    dtype=st.sampled_from(DTYPES),
    block=st.integers(1, 90),
    collect=st.sampled_from([0, 3, 100]),
)
def test_is_a_stable_sort(data, n, dtype, block, collect):
    number = st.one_of(
        st.sampled_from(SPECIAL), st.integers(-3, 3).map(float), st.floats(-10, 10, width=32)
    )
    scores = torch.tensor(data.draw(st.lists(number, min_size=n, max_size=n)), dtype=dtype)
    ranks = data.draw(st.lists(st.integers(1, n), min_size=1, max_size=4))
    check(scores, ranks, block=block, collect=collect)


@pytest.mark.parametrize("dtype", DTYPES)
def test_close_scores_take_every_digit(dtype):
    eps = torch.finfo(dtype).eps
    scores = 1 + eps * torch.randperm(3000, generator=torch.Generator().manual_seed(1)).to(dtype)
    check(scores, [1, 1500, 3000], block=700, collect=10)


def test_ranks_may_follow_from_the_nonzero_scores():
    scores = torch.tensor([0.0, 3.0, 0.0, 1.0, 2.0, -0.0])
    cuts = rank_cuts(lambda a, b: scores[a:b], 6, lambda nonzero: [nonzero], block=4)
    assert cuts == [Cut(1.0, 4)]
    assert rank_cuts(lambda a, b: scores[a:b], 6, lambda nonzero: []) == []


def test_sweeps_are_few():
    scores = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).abs()
    calls = []

    def score(begin, end):
        calls.append(begin)
        return scores[begin:end]

    rank_cuts(score, 10_000, [100, 5000, 7500], block=1000)
    assert calls == 2 * [*range(0, 10_000, 1000)]


def test_refuses_ranks_out_of_range():
    for rank in (0, 4):
        with pytest.raises(ValueError, match=rf"expected ranks in \[1, 3\], got {rank}"):
            rank_cuts(lambda a, b: torch.zeros(b - a), 3, [rank])

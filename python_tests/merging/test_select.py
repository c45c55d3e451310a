import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergeme_ext.merging.select import select


def check(rows, ranks, cuts):
    def scores():
        return zip(*(row.split(cuts) for row in rows), strict=True)

    found = select(scores, lambda numel: ranks)
    for row, wanted, ranked in zip(rows, ranks, found, strict=True):
        order = row.sort()[0]
        for rank, one in zip(wanted, ranked, strict=True):
            value = order[rank].item()
            assert one.value == value
            assert one.below + one.equal + one.above == row.numel()
            assert one.below <= rank < one.below + one.equal
            if value != 0:  # -0 has a place of its own
                assert one.below == (row < value).sum() and one.above == (row > value).sum()


@given(
    dtype=st.sampled_from([torch.float32, torch.float64]),
    numel=st.integers(1, 700),
    cut=st.integers(1, 300),
    seed=st.integers(0, 2**31),
    spread=st.integers(0, 40),
    ties=st.booleans(),
    data=st.data(),
)
def test_matches_a_sort(dtype, numel, cut, seed, spread, ties, data):
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(3):
        x = torch.randn(numel, generator=g, dtype=torch.float64)
        x *= torch.pow(10.0, torch.randint(-spread, spread + 1, (numel,), generator=g))
        rows.append((x.sign() * 3 if ties else x).to(dtype))
    rank = st.integers(0, numel - 1)
    ranks = [data.draw(st.lists(rank, max_size=4)) for _ in rows]
    check(rows, ranks, cut)


def test_extremes():
    tiny = torch.finfo(torch.float32).tiny
    row = torch.tensor(
        [float("inf"), -float("inf"), -0.0, 0.0, 1e-45, -1e-45, tiny, 3.4e38, -3.4e38]
    )
    check([row], [list(range(9))], 4)
    check([row.double(), row.double() * 1e-200], [list(range(9))] * 2, 2)
    nan = select(lambda: [[torch.tensor([float("nan"), float("inf")])]], lambda n: [[0, 1]])
    assert nan[0][0].value == float("inf") and nan[0][1].value != nan[0][1].value


def test_one_double_makes_all_doubles():
    x = torch.randn(50)
    y = torch.randn(30, dtype=torch.float64)
    found = select(lambda: [[x], [y]], lambda numel: [[numel // 2]])
    assert found[0][0].value == torch.cat([x.double(), y]).sort()[0][40].item()


def test_counts_rounds_and_checks_ranks():
    rounds = []

    def scores(dtype=torch.float32):
        rounds.append(1)
        return [[torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=dtype)]]

    select(scores, lambda numel: [[0]])
    assert len(rounds) == 2
    with pytest.raises(IndexError, match=r"expected ranks in \[0, 9\), got 9"):
        select(scores, lambda numel: [[numel]])
    assert select(lambda: [], lambda numel: []) == []

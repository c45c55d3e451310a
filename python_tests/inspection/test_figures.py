import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeme_ext.inspection.figures import BLOCK, Figures, measure
from mergeme_ext.ops import masked_norms
from python_tests.support.merge_inputs import models
from python_tests.support.toy import BASE, DTYPES, MODELS

NAN, INF = math.nan, math.inf


def reference(base, tensors):
    """The figures by loops over Python floats."""
    rows = [t.double().tolist() for t in tensors]
    zero = [0.0] * len(rows[0]) if base is None else base.double().tolist()
    usable = [
        k for k in range(len(zero)) if all(math.isfinite(r[k]) for r in rows) and abs(zero[k]) < INF
    ]
    deltas = [[r[k] - zero[k] for k in usable] for r in rows]
    dot = [[math.fsum(a * b for a, b in zip(x, y, strict=True)) for y in deltas] for x in deltas]
    pairs = list(combinations(range(len(rows)), 2))
    columns = list(zip(*deltas, strict=True))
    conflicts = sum(any(d > 0 for d in c) and any(d < 0 for d in c) for c in columns)
    contested = sum(sum(d != 0 for d in c) > 1 for c in columns)
    return {
        "cosine": [dot[i][j] / math.sqrt(dot[i][i] * dot[j][j]) for i, j in pairs],
        "sign_conflict": conflicts / contested if contested else None,
        "pair_sign_conflict": [
            sum(c[i] * c[j] < 0 for c in columns) / sum(c[i] * c[j] != 0 for c in columns)
            for i, j in pairs
        ],
        "l1": [math.fsum(map(abs, d)) for d in deltas],
        "l2": [math.sqrt(dot[m][m]) for m in range(len(rows))],
        "linf": [max(map(abs, d)) for d in deltas],
        "unchanged": [sum(v == 0 for v in d) / len(usable) for d in deltas],
        "base_l2": math.sqrt(math.fsum(zero[k] ** 2 for k in usable)),
        "contested": contested,
    }


def assert_same(figures, expected):
    document = figures.document()
    for name, value in expected.items():
        assert document[name] == pytest.approx(value, rel=1e-12, abs=1e-15), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_worked_numbers(dtype):
    figures = measure(BASE.to(dtype), [m.to(dtype) for m in MODELS])
    assert figures.gram[0] == (1.22265625, 0.328125, -0.81640625)
    assert figures.gram[1][1:] == (1.46875, -0.296875) and figures.gram[2][2] == 1.17578125
    assert figures.cosine == pytest.approx((0.244857, -0.680911, -0.225911), abs=1e-6)
    assert figures.base_square == 15.25
    assert figures.relative_norm[1] == pytest.approx(math.sqrt(1.46875 / 15.25))
    assert figures.sign_conflict == 5 / 6
    assert figures.pair_sign_conflict == (1 / 4, 4 / 5, 4 / 5)
    assert figures.unchanged == pytest.approx((1 / 6, 1 / 6, 0))
    assert figures.linf == (0.75, 1, 0.75) and figures.l1 == (2.0625, 2.25, 2.1875)
    assert figures.non_finite == (0, 0, 0, 0)


@pytest.mark.parametrize("numel", [1, BLOCK - 1, BLOCK, 3 * BLOCK + 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_base", [True, False])
def test_matches_reference(numel, dtype, with_base):
    base, tensors = models((max(numel, 40),), dtype, num_models=4)
    base = base if with_base else None
    assert_same(measure(base, tensors), reference(base, tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_the_op(dtype):
    base, tensors = models((777, 31), dtype)
    norms = masked_norms(base, tensors, torch.ones(3, 2, dtype=torch.float64))
    figures = measure(base.flatten(), [t.flatten() for t in tensors])
    got = torch.tensor([figures.l1, figures.l2, figures.linf], dtype=torch.float64).T
    torch.testing.assert_close(got, norms[:, :3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_non_finite_elements_count_nowhere_else(bad):
    base, tensors = models((5000,), torch.bfloat16)
    spoilt_base, spoilt = base.clone(), [t.clone() for t in tensors]
    spoilt_base[7] = spoilt[1][7] = spoilt[1][4999] = spoilt[2][0] = bad
    figures = measure(spoilt_base, spoilt)
    assert figures.non_finite == (1, 0, 2, 1) and (figures.numel, figures.usable) == (5000, 4997)
    assert_same(figures, reference(spoilt_base, spoilt))
    kept = [k for k in range(5000) if k not in (0, 7, 4999)]
    assert figures.contested == measure(base[kept], [t[kept] for t in tensors]).contested


@settings(max_examples=40, deadline=None)
@given(numel=st.integers(2, 3 * BLOCK), part=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_parts_add_up(numel, part, seed):
    base, tensors = models((numel,), torch.float32, seed=seed)
    cut = int(part * numel)
    pieces = [slice(0, cut), slice(cut, numel)]
    both = sum(
        (measure(base[p], [t[p] for t in tensors]) for p in pieces if p.stop > p.start),
        Figures.zero(3),
    )
    whole = measure(base, tensors)
    assert (both.changed, both.conflicts, both.linf) == (whole.changed, whole.conflicts, whole.linf)
    for name in ("cosine", "l1", "l2", "relative_norm"):
        assert getattr(both, name) == pytest.approx(
            getattr(whole, name), rel=1e-12, abs=1e-14, nan_ok=True
        )


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads):
    before = torch.get_num_threads()
    base, tensors = models((40 * BLOCK + 5,), torch.bfloat16)
    expected = measure(base, tensors)
    try:
        torch.set_num_threads(threads)
        assert measure(base, tensors) == expected
    finally:
        torch.set_num_threads(before)


def test_degenerate():
    same = measure(BASE, [BASE, BASE])
    assert math.isnan(same.cosine[0]) and math.isnan(same.sign_conflict)
    assert same.unchanged == (1, 1) and same.relative_norm == (0, 0)
    assert same.document()["cosine"] == [None]
    twins = measure(BASE, [MODELS[0], MODELS[0]])
    assert twins.cosine == (1,) and twins.sign_conflict == 0
    opposite = measure(BASE, [MODELS[0], 2 * BASE - MODELS[0]])
    assert opposite.cosine == (-1,) and opposite.sign_conflict == 1
    one = measure(BASE, [MODELS[0]])
    assert one.cosine == () and one.contested == 0
    assert math.isnan(measure(torch.zeros(6), [MODELS[0]]).relative_norm[0])

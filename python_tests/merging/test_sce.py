import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeme_ext.merging import get
from python_tests.references import mask_methods as reference
from python_tests.support.toy import (
    BASE,
    DTYPES,
    MODELS,
    assert_close,
    assert_example,
    flat,
    in_chunks,
    make,
)

SCE = get("sce")


def weights_of(base, models, **options):
    notes = {}
    SCE.prepare(base, models, SCE.bind(len(models), options), notes=notes)
    return notes


def test_worked_example():
    out = SCE(BASE, MODELS, select_topk=0.4)
    assert_example(out, [1, -2, 0.5, 0.613782, 2.402244, -1])
    out = SCE(BASE, MODELS)
    assert_example(out, [1.316164, -1.375, 1.166544, 0.408926, 2.443215, -0.9375])
    for tau, expected in (
        (0.4, [0.495935, 0.138211, 0.365854]),
        (1, [0.316162, 0.379798, 0.304040]),
    ):
        notes = weights_of(BASE, MODELS, select_topk=tau)
        assert notes == {"weights": pytest.approx(expected, abs=1e-6)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau", [0.1, 0.5, 0.93, 1])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_matches_loop(dtype, tau, count):
    base, models = make(dtype, models=count)
    out = SCE(base, models, select_topk=tau)
    expected = reference.sce(flat(base), [flat(m) for m in models], tau)
    assert_close(out, expected, terms=6 * count + 10)


def test_places_that_do_not_vary_do_not_count():
    base = torch.zeros(10)
    first = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    second = first.clone()
    second[[2, 5, 7, 8]] -= torch.tensor([0.5, 1.5, 1.0, 0.1])
    for tau, kept in ((0.9, [2, 5, 7]), (0.5, [5, 7]), (0.25, [5]), (0.2, []), (0, [])):
        out = SCE(base, [first, second], select_topk=tau)
        assert out.nonzero().flatten().tolist() == kept
    assert SCE(base, [first, second]).count_nonzero() == 10
    assert torch.equal(SCE(base, [first, first], select_topk=0.9), base)
    assert torch.equal(SCE(base, [first], select_topk=0.9), base)


@settings(max_examples=40)
@given(
    data=st.data(),
    n=st.integers(1, 50),
    tau=st.floats(0.01, 1),
    chunk=st.integers(1, 60),
    dtype=st.sampled_from(DTYPES),
)
def test_ties_go_to_the_lower_index_in_any_chunks(data, n, tau, chunk, dtype):
    """On a coarse grid of two models, variances are exact and ties everywhere."""
    grid = st.lists(st.integers(-4, 4), min_size=n, max_size=n)
    base, *models = (torch.tensor(data.draw(grid), dtype=dtype) / 8 for _ in range(3))
    out = SCE(base, models, select_topk=tau)
    assert_close(out, reference.sce(flat(base), [flat(m) for m in models], tau), terms=25)
    assert torch.equal(in_chunks(SCE, base, models, chunk, select_topk=tau), out)


def test_stretches_of_a_sweep_change_nothing(monkeypatch):
    from mergeme_ext.merging import sweep

    base, models = make(torch.bfloat16, shape=(40, 300))
    base, models = base.round(decimals=1), [m.round(decimals=1) for m in models]
    whole = SCE(base, models, select_topk=0.3)
    monkeypatch.setattr(sweep, "SWEEP_ELEMENTS", 4096)
    assert torch.equal(SCE(base, models, select_topk=0.3), whole)


def test_small_changes_weigh_the_same_unless_relative():
    base, models = make(torch.float64)
    models = [base + 3e-4 * (m - base) * (i + 1) for i, m in enumerate(models)]
    notes = weights_of(base, models)
    assert notes == {"weights": [1 / 3] * 3, "uniform": True}
    notes = weights_of(base, models, uniform_below="relative")
    assert "uniform" not in notes and notes["weights"] == sorted(notes["weights"])
    out = SCE(base, models, uniform_below="relative", select_topk=0.7)
    expected = reference.sce(flat(base), [flat(m) for m in models], 0.7, relative=True)
    assert_close(out, expected, terms=30)
    tiny = [base + 1e-6 * (m - base) for m in models]
    assert weights_of(base, tiny, uniform_below="relative")["uniform"]


def test_degenerate_cases():
    assert torch.equal(SCE(BASE, [BASE, BASE]), BASE)
    assert_example(SCE(BASE, MODELS[:1]), MODELS[0].tolist())
    assert torch.equal(SCE(BASE, MODELS, select_topk=0), BASE)
    empty = torch.empty(0, 3)
    for tau in (0.5, 1):
        assert SCE(empty, [empty, empty], select_topk=tau).shape == (0, 3)
    scalar = torch.tensor(1.0)
    assert SCE(scalar, [scalar + 1, scalar + 2], select_topk=0.5) == 1


@pytest.mark.parametrize("tau", [0.5, 1])
def test_nan_shows(tau):
    models = [m.clone() for m in MODELS]
    models[1][3] = math.nan
    assert SCE(BASE, models, select_topk=tau)[3].isnan()

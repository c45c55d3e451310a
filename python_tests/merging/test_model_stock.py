import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeme_ext.merging import get
from python_tests.references import angle_methods as reference
from python_tests.support.toy import (
    BASE,
    DTYPES,
    MODELS,
    assert_close,
    assert_example,
    flat,
    in_chunks,
    make,
    terms_of,
)

STOCK = get("model_stock")
ZERO = torch.zeros(2, 2)
WEIGHTS = [torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 2.0]])]


def noted(base, tensors, **parameters):
    notes = {}
    STOCK.prepare(base, tensors, STOCK.bind(len(tensors), parameters), notes=notes)
    return notes


def test_worked_examples():
    out = STOCK(ZERO, WEIGHTS)
    assert_example(out, [[0.308774, 0.154387], [0.308774, 0.308774]])
    assert noted(ZERO, WEIGHTS) == pytest.approx({"t": 0.308774, "cosine": 0.182574}, abs=1e-6)
    out = STOCK(ZERO, WEIGHTS, filter_wise=True)
    assert_example(out, [[0.828427, 0.414214], [0, 0]])
    notes = noted(ZERO, WEIGHTS, filter_wise=True)
    expected = {"min": 0, "mean": 0.414214, "max": 0.828427}
    assert notes["t"] == pytest.approx(expected, abs=1e-6)
    assert notes["cosine"] == pytest.approx({"min": 0, "mean": 0.353553, "max": 0.707107}, abs=1e-6)


def test_worked_examples_of_toy_data():
    out = STOCK(BASE, MODELS[:2])
    assert_example(out, [1.049174, -2.098348, 0.696695, 0.172108, 2.778718, -0.987707])
    assert noted(BASE, MODELS[:2]) == pytest.approx({"t": 0.393390, "cosine": 0.244857}, abs=1e-6)
    out = STOCK(BASE, MODELS)  # the bad case: away from the mean
    assert_example(out, [0.851894, -2.049369, 0.006312, -0.049369, 3.296213, -1])
    assert noted(BASE, MODELS) == pytest.approx({"t": -1.184852, "cosine": -0.220655}, abs=1e-6)
    assert torch.equal(STOCK(BASE, MODELS, clamp_t=True), BASE)
    assert noted(BASE, MODELS, clamp_t=True)["t"] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", ["all", "row"])
@pytest.mark.parametrize("num_models", [2, 3, 5])
def test_matches_loop(dtype, axis, num_models):
    base, models = make(dtype, models=num_models)
    common = 0.5 * (models[0] - base)  # of independent task vectors the divisor could be near zero
    models = [m + common for m in models]
    out = STOCK(base, models, filter_wise=axis == "row")
    shape = tuple(base.shape)
    expected = reference.model_stock(flat(base), [flat(m) for m in models], shape, axis)
    assert_close(out, expected, 8 * terms_of(dtype, num_models))


def test_degenerate_cases():
    base, models = make(torch.float32)
    for options in ({}, {"filter_wise": True}):
        same = STOCK(base, [models[0]] * 3, **options)  # a cosine of 1: the mean
        torch.testing.assert_close(same, models[0])
        assert torch.equal(STOCK(base, [base] * 3, **options), base)
        opposite = STOCK(torch.zeros(6), [MODELS[0], -MODELS[0]], **options)
        assert torch.equal(opposite, torch.zeros(6))
        for shape in ((0, 3), (3, 0)):
            empty = torch.empty(shape)
            assert STOCK(empty, [empty, empty], **options).shape == shape
    assert STOCK(torch.zeros(()), [torch.ones(())] * 2).item() == pytest.approx(1)


def test_small_task_vectors_are_noted():
    base = torch.zeros(8)
    small = [torch.full((8,), 1e-5)] * 2  # a cosine of 1, seen as 8e-10 / 1e-6
    notes = noted(base, small)
    assert notes["floored"] and notes["cosine"] == pytest.approx(8e-4, rel=1e-4)
    assert "floored" not in noted(base, [base, base])


@settings(max_examples=30)
@given(filter_wise=st.booleans(), chunk=st.integers(1, 130), dtype=st.sampled_from(DTYPES))
def test_chunks_and_order(filter_wise, chunk, dtype):
    base, models = make(dtype)
    out = STOCK(base, models, filter_wise=filter_wise)
    assert torch.equal(in_chunks(STOCK, base, models, chunk, filter_wise=filter_wise), out)
    if dtype == torch.float64:
        torch.testing.assert_close(STOCK(base, models[::-1], filter_wise=filter_wise), out)


def test_many_rows_on_any_number_of_threads():
    g = torch.Generator().manual_seed(0)
    base, *models = torch.randn(3, 70_001, 3, generator=g)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(STOCK(base, models, filter_wise=True))
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_bad_requests():
    with pytest.raises(ValueError, match="expected at least 2 models besides the base, got 1"):
        STOCK(BASE, MODELS[:1])
    with pytest.raises(ValueError, match="expected clamp_t to be true or false, got 'yes'"):
        STOCK(BASE, MODELS, clamp_t="yes")

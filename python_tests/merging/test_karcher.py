import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeme_ext.merging import get
from python_tests.references import angle_methods as reference
from python_tests.support.toy import (
    DTYPES,
    MODELS,
    assert_close,
    assert_example,
    flat,
    in_chunks,
    make,
    terms_of,
)

KARCHER = get("karcher")


def test_worked_examples():
    corners = [torch.tensor(x) for x in ([1.0, 0, 0], [0, 2.0, 0], [0, 0, 3.0])]
    assert_example(KARCHER(None, corners), [1.154701] * 3)
    plane = [torch.tensor(x) for x in ([1.0, 0], [0, 1.0], [0.707107, 0.707107], [1.0, 0])]
    assert_example(KARCHER(None, plane), [0.831470, 0.555570])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", [[1, 1, 1], [0.2, 3, 1], [1, 0, 1]], ids=str)
@pytest.mark.parametrize("spread", [1, 4])
def test_matches_loop(dtype, weights, spread):
    base, models = make(torch.float64)
    models = [(base + spread * (m - base)).to(dtype) for m in models]
    out = KARCHER(None, models, weights=weights)
    assert out.dtype == dtype
    expected = reference.karcher([flat(m) for m in models], weights)
    assert_close(out, expected, terms_of(dtype, 3))


@pytest.mark.parametrize("max_iter, tol", [(1, 1e-5), (2, 1e-12), (50, 1e-12)])
def test_iterations(max_iter, tol):
    base, models = make(torch.float64)
    models = [base + 5 * (m - base) for m in models]
    out = KARCHER(None, models, max_iter=max_iter, tol=tol)
    expected = reference.karcher([flat(m) for m in models], [1, 1, 1], max_iter, tol)
    assert_close(out, expected, terms_of(torch.float64, 3))
    notes = {}
    bound = KARCHER.bind(3, {"max_iter": max_iter, "tol": tol})
    KARCHER.prepare(None, models, bound, notes=notes)
    assert notes["iterations"] <= max_iter and (max_iter < 50 or notes["last_step"] < tol)


def test_the_mean_is_where_all_forces_cancel():
    base, models = make(torch.float64)
    models = [base + 5 * (m - base) for m in models]
    mean = KARCHER(None, models, weights=[1, 2, 3], max_iter=100, tol=1e-13).flatten()
    u = mean / mean.norm()
    force = torch.zeros_like(u)
    for weight, model in zip([1, 2, 3], models, strict=True):
        unit = model.flatten() / model.norm()
        angle = torch.dot(u, unit).clamp(-1, 1).acos()
        force += weight * angle / angle.sin() * (unit - angle.cos() * u)
    assert force.norm() < 1e-10
    length = sum(w * m.norm() for w, m in zip([1, 2, 3], models, strict=True)) / 6
    torch.testing.assert_close(mean.norm(), length)


def test_degenerate_cases():
    assert torch.equal(KARCHER(None, MODELS[:1]), MODELS[0])
    torch.testing.assert_close(KARCHER(None, [MODELS[0]] * 3), MODELS[0])
    torch.testing.assert_close(KARCHER(None, MODELS[:2], weights=[2, 0]), MODELS[0])
    zero = torch.zeros(6)
    assert torch.equal(KARCHER(None, [zero, zero]), zero)
    torch.testing.assert_close(KARCHER(None, [zero, MODELS[0]]), MODELS[0] / 2)  # half its length
    tiny = [torch.full((4,), 1e-7), torch.full((4,), 3e-7)]
    torch.testing.assert_close(KARCHER(None, tiny), torch.full((4,), 2e-7), rtol=1e-6, atol=0)
    torch.testing.assert_close(KARCHER(None, [MODELS[0], -3 * MODELS[0]]), 2 * MODELS[0])
    empty = torch.empty(0, 3)
    assert KARCHER(None, [empty, empty]).shape == (0, 3)


@settings(max_examples=30)
@given(chunk=st.integers(1, 130), scale=st.floats(0.1, 10), dtype=st.sampled_from(DTYPES))
def test_chunks_and_scale_of_weights(chunk, scale, dtype):
    _, models = make(dtype)
    out = KARCHER(None, models, weights=[0.2, 0.5, 1])
    assert torch.equal(in_chunks(KARCHER, None, models, chunk, weights=[0.2, 0.5, 1]), out)
    scaled = KARCHER(None, models, weights=[0.2 * scale, 0.5 * scale, scale])
    torch.testing.assert_close(scaled, out)


def test_bad_requests():
    for weights in ([1, -1], [0, 0]):
        with pytest.raises(ValueError, match="karcher: expected weights of at least 0, not all 0"):
            KARCHER(None, MODELS[:2], weights=weights)
    with pytest.raises(ValueError, match="max_iter to be a whole number of at least 1, got 0"):
        KARCHER(None, MODELS, max_iter=0)
    with pytest.raises(ValueError, match="tol to be a finite number above 0, got 0"):
        KARCHER(None, MODELS, tol=0)

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

SLERP = get("slerp")


def test_worked_examples():
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    assert_example(SLERP(x, [y], t=0.25), [0.923880, 0.765367])
    assert_example(SLERP(x, [torch.tensor([-2.0, 0.0])], t=0.25), [0.25, 0])
    a, b, _ = MODELS
    expected = [1.144294, -2.288588, 1.017150, 0.445003, 2.479304, -0.985364]
    assert_example(SLERP(a, [b], t=0.5), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", [0, 0.3, 1, 1.5])
def test_matches_loop(dtype, t):
    base, (model, *_) = make(dtype)
    out = SLERP(base, [model], t=t)
    assert out.dtype == dtype
    assert_close(out, reference.slerp(flat(base), flat(model), t), terms_of(dtype, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearly_parallel_weights_are_interpolated_linearly(dtype):
    base, (model, *_) = make(dtype)
    near = (base.double() + 1e-3 * (model.double() - base.double())).to(dtype)
    out = SLERP(base, [near], t=0.3)
    b, n = base.double(), near.double()
    expected = 0.7 * b + 0.3 * n, (0.7 * b).abs() + (0.3 * n).abs()
    assert_close(out, [flat(e) for e in expected], terms_of(dtype, 2))


def test_degenerate_cases():
    base, (model, *_) = make(torch.float32)
    assert torch.equal(SLERP(base, [model], t=0), base)
    assert torch.equal(SLERP(base, [model], t=1), model)
    torch.testing.assert_close(SLERP(base, [base], t=0.3), base, rtol=2e-7, atol=0)
    half = base.bfloat16()
    assert torch.equal(SLERP(half, [half], t=0.3), half)
    assert torch.equal(SLERP(base, [-base], t=0.5), torch.zeros_like(base))  # through zero
    zero = torch.zeros_like(base)
    assert torch.equal(SLERP(zero, [zero], t=0.5), zero)
    torch.testing.assert_close(SLERP(zero, [base], t=0.5), base * 0.5**0.5)  # a right angle
    empty = torch.empty(0, 3)
    assert SLERP(empty, [empty], t=0.5).shape == (0, 3)


@settings(max_examples=30)
@given(t=st.floats(0, 1), chunk=st.integers(1, 130), dtype=st.sampled_from(DTYPES))
def test_chunks_and_direction(t, chunk, dtype):
    base, (model, *_) = make(dtype)
    out = SLERP(base, [model], t=t)
    assert torch.equal(in_chunks(SLERP, base, [model], chunk, t=t), out)
    if dtype == torch.float64:
        torch.testing.assert_close(SLERP(model, [base], t=1 - t), out, rtol=1e-9, atol=1e-9)


def test_of_equal_norms_the_norm_stays():
    base, (model, *_) = make(torch.float64)
    model = model * base.norm() / model.norm() * torch.where(base > 0, 1, -1)
    for t in (0.1, 0.5, 0.9):
        torch.testing.assert_close(SLERP(base, [model], t=t).norm(), base.norm())


def test_bad_requests():
    base, models = make(torch.float32)
    with pytest.raises(ValueError, match="slerp: expected 1 model besides the base, got 3"):
        SLERP(base, models, t=0.5)
    with pytest.raises(ValueError, match="slerp: expected a base, got None"):
        SLERP(None, models[:1], t=0.5)
    with pytest.raises(TypeError, match="slerp: expected parameter t, which has no default"):
        SLERP(base, models[:1])
    with pytest.raises(ValueError, match="slerp: expected t to be a finite number, got 'x'"):
        SLERP(base, models[:1], t="x")

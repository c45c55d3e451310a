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

MULTISLERP = get("multislerp")
X, Y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])


def test_worked_example():
    assert_example(MULTISLERP(None, [X, Y], weights=[1, 3]), [0.553399, 1.660196])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize(
    "weights, normalize", [([1, 1, 1], True), ([0.5, -0.2, 1], False)], ids=str
)
def test_matches_loop(dtype, with_base, weights, normalize):
    base, models = make(dtype)
    base = base if with_base else None
    out = MULTISLERP(base, models, weights=weights, normalize_weights=normalize)
    flat_base = None if base is None else flat(base)
    expected = reference.multislerp(flat_base, [flat(m) for m in models], weights, normalize)
    assert_close(out, expected, terms_of(dtype, 3))


def test_a_large_eps_counts():
    _, models = make(torch.float64)
    out = MULTISLERP(None, models, weights=1, eps=0.1)
    expected = reference.multislerp(None, [flat(m) for m in models], [1, 1, 1], eps=0.1)
    assert_close(out, expected, terms_of(torch.float64, 3))


def test_degenerate_cases():
    assert torch.equal(MULTISLERP(None, MODELS[:1], weights=3), MODELS[0])
    assert torch.equal(MULTISLERP(BASE, MODELS[:1], weights=3), MODELS[0])
    assert torch.equal(MULTISLERP(BASE, [BASE] * 3, weights=1), BASE)
    torch.testing.assert_close(MULTISLERP(None, [BASE] * 3, weights=1), BASE)
    zero = torch.zeros(4)
    assert torch.equal(MULTISLERP(None, [zero] * 3, weights=1), zero)
    empty = torch.empty(0, 3)
    assert MULTISLERP(empty, [empty] * 3, weights=1).shape == (0, 3)


def test_directions_that_cancel():
    bound, notes = MULTISLERP.bind(2, {"weights": [1, 1]}), {}
    combine = MULTISLERP.prepare(None, [X, -3 * X], bound, notes=notes)
    assert torch.equal(combine(None, [X, -3 * X], 0), -X) and notes == {"linear": True}
    three = [X, torch.tensor([-0.5, 0.75**0.5]), torch.tensor([-0.5, -(0.75**0.5)])]
    with pytest.raises(ValueError, match="multislerp: expected directions that do not cancel"):
        MULTISLERP(None, three, weights=1)
    with pytest.raises(ValueError, match="directions of tensor 'w' that do not cancel"):
        MULTISLERP(None, three, weights=1, tensor_name="w")
    assert MULTISLERP(None, three, weights=[1, 1, 2]).isfinite().all()


def test_bad_requests():
    with pytest.raises(ValueError, match="multislerp: expected weights with a sum other than 0"):
        MULTISLERP(None, [X, Y], weights=[1, -1])
    with pytest.raises(ValueError, match="expected eps to be a finite number above 0, got 0"):
        MULTISLERP(None, [X, Y], weights=1, eps=0)


@settings(max_examples=30)
@given(
    with_base=st.booleans(),
    chunk=st.integers(1, 130),
    scale=st.floats(0.1, 10),
    dtype=st.sampled_from(DTYPES),
)
def test_chunks_and_scale_of_weights(with_base, chunk, scale, dtype):
    base, models = make(dtype)
    base = base if with_base else None
    out = MULTISLERP(base, models, weights=[0.2, 0.5, 1])
    parts = in_chunks(MULTISLERP, base, models, chunk, weights=[0.2, 0.5, 1])
    assert torch.equal(parts, out)
    scaled = MULTISLERP(base, models, weights=[0.2 * scale, 0.5 * scale, scale])
    torch.testing.assert_close(scaled, out)

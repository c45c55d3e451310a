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

NUSLERP = get("nuslerp")
# What recipes say, by what the vectors are.
AXES = {
    "all": {},
    "row": {"nuslerp_flatten": False},
    "column": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
}


@pytest.mark.parametrize(
    "axis, expected",
    [
        ("all", [[0.381886, 1.452892], [0, 2.561224]]),
        ("row", [[0.5, 1.732051], [0, 2.333333]]),
        ("column", [[0.5, 1.377461], [0, 2.417280]]),
    ],
)
def test_worked_examples(axis, expected):
    first, second = torch.eye(2), torch.tensor([[0.0, 2.0], [0.0, 3.0]])
    assert_example(NUSLERP(None, [first, second], weights=[1, 2], **AXES[axis]), expected)


def test_worked_example_with_base():
    out = NUSLERP(BASE, MODELS[:2], weights=1)
    assert_example(out, [1.158440, -2.316880, 1.133761, 0.554540, 2.287019, -0.960390])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("weights", [[1.0, 2.0], [0.3, -0.1]], ids=str)
def test_matches_loop(dtype, axis, with_base, weights):
    base, models = make(dtype, models=2)
    base = base if with_base else None
    out = NUSLERP(base, models, weights=weights, **AXES[axis])
    flat_base = None if base is None else flat(base)
    expected = reference.nuslerp(
        flat_base, [flat(m) for m in models], weights, tuple(models[0].shape), axis
    )
    assert_close(out, expected, terms_of(dtype, 2))


@pytest.mark.parametrize("shape", [(6,), (2, 3, 4), ()], ids=str)
def test_other_dimensions(shape):
    base, models = make(torch.float64, shape=shape, models=2)
    rows = (models[0].numel() // shape[-1], shape[-1]) if shape else (1, 1)
    columns = (shape[0], models[0].numel() // shape[0]) if shape else (1, 1)
    for axis, view in (("row", rows), ("column", columns)):
        out = NUSLERP(base, models, weights=[1, 2], **AXES[axis])
        expected = reference.nuslerp(flat(base), [flat(m) for m in models], [1, 2], view, axis)
        assert_close(out, expected, terms_of(torch.float64, 2))


def test_degenerate_cases():
    base, models = make(torch.float32, models=2)
    for options in AXES.values():
        assert torch.equal(NUSLERP(None, models, weights=[1, 0], **options), models[0])
        assert torch.equal(NUSLERP(None, models, weights=[0, 1], **options), models[1])
        assert torch.equal(NUSLERP(base, [base, base], weights=1, **options), base)
        half = NUSLERP(None, models, weights=[1, -1], **options)  # no sum: t is a half
        assert torch.equal(half, NUSLERP(None, models, weights=1, **options))
        same = NUSLERP(None, [models[0]] * 2, weights=[1, 2], **options)
        torch.testing.assert_close(same, models[0], rtol=3e-7, atol=0)
        opposite = NUSLERP(None, [models[0], -2 * models[0]], weights=[2, 1], **options)
        assert torch.allclose(opposite, torch.zeros(()), atol=1e-6)  # linear, through zero
        for shape in ((0, 3), (3, 0)):
            empty = torch.empty(shape)
            assert NUSLERP(empty, [empty, empty], weights=1, **options).shape == shape


def test_a_zero_row_is_orthogonal_to_every_other():
    _, models = make(torch.float32, models=2)
    models[0][3] = 0
    out = NUSLERP(None, models, weights=1, nuslerp_flatten=False)
    torch.testing.assert_close(out[3], models[1][3] * 0.5**0.5)


@settings(max_examples=30)
@given(
    axis=st.sampled_from(sorted(AXES)),
    with_base=st.booleans(),
    chunk=st.integers(1, 130),
    dtype=st.sampled_from(DTYPES),
    weight=st.floats(0, 1),
)
def test_chunks(axis, with_base, chunk, dtype, weight):
    base, models = make(dtype, models=2)
    base = base if with_base else None
    options = {"weights": [weight, 1], **AXES[axis]}
    out = NUSLERP(base, models, **options)
    assert torch.equal(in_chunks(NUSLERP, base, models, chunk, **options), out)


def test_rows_are_independent():
    base, models = make(torch.bfloat16, models=2)
    out = NUSLERP(base, models, weights=[1, 3], nuslerp_flatten=False)
    for r in (0, 5):
        row = NUSLERP(base[r], [m[r] for m in models], weights=[1, 3])
        assert torch.equal(out[r], row)
    turned = NUSLERP(
        base.t().contiguous(),
        [m.t().contiguous() for m in models],
        weights=[1, 3],
        **AXES["column"],
    )
    torch.testing.assert_close(turned.t(), out)


def test_bad_requests():
    base, models = make(torch.float32)
    with pytest.raises(ValueError, match="nuslerp: expected 2 models, got 3"):
        NUSLERP(base, models, weights=1)
    with pytest.raises(ValueError, match="expected nuslerp_flatten to be true or false, got 1"):
        NUSLERP(base, models[:2], weights=1, nuslerp_flatten=1)

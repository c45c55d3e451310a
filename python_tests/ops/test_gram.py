import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mergeme_ext
from python_tests.references.gram import gram as reference
from python_tests.support.backends import BACKENDS, CPU, SCHEDULES, SIMT
from python_tests.support.merge_inputs import DTYPES, misaligned, models, toy, transposed

OP = "gram"
AXES = ["all", "row", "column"]
# (shape, number of models): empty, one number, one element, one model, odd sizes, no rows, rows of
# nothing, more than one block of rows, many models, three dimensions.
CASES = [
    ((0,), 2),
    ((), 2),
    ((1,), 3),
    ((33, 65), 1),
    ((17, 37), 4),
    ((0, 5), 2),
    ((5, 0), 2),
    ((4099,), 3),
    ((2, 4200), 2),
    ((300, 3), 2),
    ((5, 7), 9),
    ((3, 4, 5), 2),
]


def run(backend, base, tensors, axis="all"):
    return backend.op(OP)(base, tensors, axis=axis)


def check(backend, base, tensors, axis):
    out = run(backend, base, tensors, axis).cpu()
    value, size = reference(base, tensors, axis)
    assert out.dtype == torch.float64 and out.shape == value.shape and out.is_contiguous()
    # n products of float32 numbers, or n rounded ones of float64 numbers, added in float64.
    n, u = tensors[0].numel() + 1, 2.0**-53
    assert ((out - value).abs() <= n * u / (1 - n * u) * size + 5e-324).all()
    assert torch.equal(out, out.transpose(1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape, num_models", CASES, ids=str)
def test_matches_reference(backend, dtype, axis, shape, num_models):
    base, tensors = models(shape, dtype, num_models, device=backend.device)
    check(backend, base, tensors, axis)
    check(backend, None, tensors, axis)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [transposed, misaligned])
def test_layouts(backend, dtype, layout):
    base, tensors = models((33, 65), dtype, device=backend.device)
    for axis in AXES:
        check(backend, layout(base), [layout(t) for t in tensors], axis)


def test_worked_example():
    base, tensors = toy()
    g = mergeme_ext.gram(base, tensors)[0]
    d = torch.stack(tensors) - base
    assert torch.equal(g, d @ d.t())  # all numbers are short: exact
    cosine = g[0, 1] / (g[0, 0] * g[1, 1]).sqrt()
    assert cosine.item() == pytest.approx(0.244857, abs=1e-6)


def test_small_differences_do_not_vanish():
    """In float32 the products of these would be zero."""
    tensors = [torch.full((64,), 1e-25), torch.full((64,), 2e-25)]
    g = mergeme_ext.gram(None, tensors)[0]
    assert g[0, 1].item() == pytest.approx(64 * 2e-50, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("axis", AXES)
def test_registration_and_gradient(backend, axis):
    base, tensors = models((3, 4, 2), torch.float32, device=backend.device)
    for start in (base, None):
        torch.library.opcheck(backend.op(OP), (start, tensors), {"axis": axis})
    tensors[0].requires_grad_()
    with pytest.raises(NotImplementedError, match=f"mergeme::{OP}"):
        run(backend, base, tensors, axis).sum().backward()


BAD_INPUTS = [
    (lambda b, t: (b.int(), t, "all"), TypeError, "expected base to be float16.*got int32"),
    (lambda b, t: (None, [t[0].int()], "all"), TypeError, r"tensors\[0\] to be float16.*int32"),
    (lambda b, t: (b, [t[0], t[1].half()], "all"), TypeError, r"tensors\[1\] to be float32"),
    (lambda b, t: (b, [], "all"), ValueError, "expected tensors to hold at least one tensor"),
    (lambda b, t: (b, [t[0][:1]], "row"), ValueError, r"tensors\[0\] of shape \[3, 4\]"),
    (lambda b, t: (b, t, "diagonal"), ValueError, "axis to be all, row or column, got diagonal"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spoil, error, message", BAD_INPUTS)
def test_rejects_bad_input(backend, spoil, error, message):
    base, tensors = models((3, 4), torch.float32, 2, device=backend.device)
    with pytest.raises(error, match=f"mergeme::{OP}: .*{message}"):
        run(backend, *spoil(base, tensors))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_shows_where_it_is(backend):
    _, tensors = models((5, 40), torch.bfloat16, 3, device=backend.device)
    tensors[1][2, 39] = math.nan
    out = run(backend, None, tensors, "row")
    assert out[2].isnan().tolist() == [[False, True, False], [True] * 3, [False, True, False]]
    assert not out[[0, 1, 3, 4]].isnan().any()


@settings(max_examples=40)
@given(
    rows=st.integers(1, 300),
    length=st.integers(1, 30),
    num_models=st.integers(1, 6),
    axis=st.sampled_from(AXES),
    with_base=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_backends_agree_to_the_bit(rows, length, num_models, axis, with_base, dtype, seed):
    base, tensors = models((rows, length), dtype, num_models, seed)
    base = base if with_base else None
    assert torch.equal(run(CPU, base, tensors, axis), run(SIMT, base, tensors, axis))


@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 9)),
    scale=st.sampled_from([0.5, 2.0, -4.0]),
    axis=st.sampled_from(AXES),
    seed=st.integers(0, 2**31),
)
def test_scaling_and_order(shape, scale, axis, seed):
    _, tensors = models(shape, torch.float32, 3, seed)
    g = run(CPU, None, tensors, axis)
    scaled = run(CPU, None, [tensors[0] * scale, *tensors[1:]], axis)
    factors = torch.tensor([scale, 1, 1], dtype=torch.float64)
    assert torch.equal(scaled, g * factors * factors[:, None])
    assert torch.equal(run(CPU, None, tensors[::-1], axis), g.flip(1, 2))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("num_models", [2, 5])
def test_threads_change_no_bit(axis, num_models):
    base, tensors = models((601, 701), torch.bfloat16, num_models)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(CPU, base, tensors, axis))
    torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("axis", AXES)
def test_thread_order_changes_no_bit(schedule, axis):
    base, tensors = models((33, 65), torch.float32, 3)
    expected = run(SIMT, base, tensors, axis)
    with schedule:
        assert torch.equal(run(SIMT, base, tensors, axis), expected)


@pytest.mark.slow
def test_compiles():
    base, tensors = models((33, 65), torch.float32)
    compiled = torch.compile(mergeme_ext.gram, fullgraph=True)
    for axis in AXES:
        expected = mergeme_ext.gram(base, tensors, axis=axis)
        assert torch.equal(compiled(base, tensors, axis=axis), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("num_models", [2, 6])
def test_on_gpu(axis, num_models):
    base, tensors = models((1500, 1001), torch.bfloat16, num_models)
    on_gpu = base.cuda(), [t.cuda() for t in tensors]
    with pytest.raises(ValueError, match=r"expected tensors\[0\] on cuda:0, got cpu"):
        mergeme_ext.gram(on_gpu[0], tensors)
    with torch.cuda.stream(torch.cuda.Stream()):
        out = mergeme_ext.gram(*on_gpu, axis=axis)
        torch.cuda.current_stream().synchronize()
    assert torch.equal(out.cpu(), mergeme_ext.gram(base, tensors, axis=axis))

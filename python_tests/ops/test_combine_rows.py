import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mergeme_ext
from python_tests.references.combine_rows import combine_rows as reference
from python_tests.support.backends import BACKENDS, CPU, SCHEDULES, SIMT
from python_tests.support.merge_inputs import DTYPES, misaligned, models
from python_tests.support.tolerance import assert_within_rounding

OP = "combine_rows"
AXES = ["all", "row", "column"]
# (elements, offset, row_length, models): nothing, one element, one row, rows shorter than a run,
# longer ones, one that no chunk holds, columns of one element, many models.
CASES = [
    (0, 0, 3, 2),
    (1, 5, 3, 3),
    (64, 0, 64, 1),
    (100, 7, 3, 2),
    (1300, 11, 37, 3),
    (1100, 900, 700, 2),
    (600, 10**6, 10**9, 2),
    (50, 4, 1, 2),
    (77, 3, 11, 20),
]


def groups_of(n, offset, row_length, axis):
    return {"all": 1, "row": -(-(offset + n) // row_length), "column": row_length}[axis]


def make(n, offset, row_length, num_models, axis, dtype, device="cpu", seed=0):
    base, tensors = models((n,), dtype, num_models, seed, device)
    g = torch.Generator().manual_seed(seed)
    groups = groups_of(n, offset, row_length, axis)
    weights = torch.randn(groups, num_models, generator=g, dtype=torch.float64).to(device)
    return base, tensors, weights, {"axis": axis, "offset": offset, "row_length": row_length}


def check(backend, base, tensors, weights, options):
    out = backend.op(OP)(base, tensors, weights, **options)
    assert out.shape == tensors[0].shape and out.dtype == tensors[0].dtype and out.is_contiguous()
    terms = 2 * len(tensors) + 3
    assert_within_rounding(out, *reference(base, tensors, weights, *options.values()), terms=terms)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("n, offset, row_length, num_models", CASES)
def test_matches_reference(backend, dtype, axis, n, offset, row_length, num_models):
    if axis == "column" and row_length > 10**6:
        pytest.skip("would need a weight for each of the columns")
    base, tensors, weights, options = make(
        n, offset, row_length, num_models, axis, dtype, backend.device
    )
    check(backend, base, tensors, weights, options)
    check(backend, None, tensors, weights, options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", AXES)
def test_layouts(backend, dtype, axis):
    base, tensors, weights, options = make(600, 5, 33, 3, axis, dtype, backend.device)
    check(backend, misaligned(base), [misaligned(t) for t in tensors], weights, options)
    strided = [t.repeat_interleave(2)[::2] for t in (base, *tensors)]
    check(backend, strided[0], strided[1:], weights.t().contiguous().t(), options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("with_base", [True, False])
def test_not_finite(backend, dtype, axis, with_base):
    """NaN, infinities and overflow, in every place of a run, come out as in plain arithmetic."""
    base, (tensor,), weights, options = make(700, 3, 33, 1, axis, dtype, backend.device)
    largest = torch.finfo(dtype).max
    for start, value in enumerate([math.nan, math.inf, -math.inf, largest, -largest]):
        tensor[start::11] = value
    base[::7] = largest
    weights.fill_(2.0)
    base = base if with_base else None
    out = backend.op(OP)(base, [tensor], weights, **options).cpu()
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x, b = tensor.cpu().to(acc), base.cpu().to(acc) if with_base else 0
    expected = (b + 2 * (x - b)).to(dtype)
    assert out.isnan().any() and out.isinf().any()
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("axis", AXES)
def test_registration_and_gradient(backend, axis):
    base, tensors, weights, options = make(20, 3, 6, 2, axis, torch.float32, backend.device)
    for start in (base, None):
        torch.library.opcheck(backend.op(OP), (start, tensors, weights), options)
    base.requires_grad_()
    with pytest.raises(NotImplementedError, match=f"mergeme::{OP}"):
        backend.op(OP)(base, tensors, weights, **options).sum().backward()


BAD_INPUTS = [
    ({"base": torch.ones(20).int()}, TypeError, "expected base to be float16.*got int32"),
    ({"base": torch.ones(4, 5)}, ValueError, r"tensors\[0\] of shape \[4, 5\]"),
    ({"tensors": []}, ValueError, "expected tensors to hold at least one tensor"),
    ({"base": None, "tensors": []}, ValueError, "expected tensors to hold at least one tensor"),
    (
        {"base": None, "tensors": [torch.ones(4, 5)] * 2},
        ValueError,
        r"tensors\[0\] of shape \[n\], got \[4, 5\]",
    ),
    ({"weights": torch.ones(4, 2)}, TypeError, "expected weights to be float64, got float32"),
    ({"weights": torch.ones(2).double()}, ValueError, r"weights of shape \[G, 2\], got \[2\]"),
    ({"weights": torch.ones(4, 3).double()}, ValueError, r"of shape \[G, 2\], got \[4, 3\]"),
    ({"weights": torch.ones(3, 2).double()}, ValueError, r"G at least the 4 rows .*got \[3, 2\]"),
    ({"axis": "all"}, ValueError, r"expected weights of shape \[1, M\] for all, got \[4, 2\]"),
    ({"axis": "column"}, ValueError, r"with G = row_length = 6 for column, got \[4, 2\]"),
    ({"axis": "both"}, ValueError, "axis to be all, row or column, got both"),
    ({"offset": -1}, ValueError, "expected offset of at least 0, got -1"),
    ({"row_length": 0}, ValueError, "expected row_length of at least 1, got 0"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changes, error, message", BAD_INPUTS)
def test_rejects_bad_input(backend, changes, error, message):
    base, tensors, weights, options = make(20, 3, 6, 2, "row", torch.float32)
    given = {"base": base, "tensors": tensors, "weights": weights, **options, **changes}
    on = {
        k: [t.to(backend.device) for t in v]
        if isinstance(v, list)
        else v.to(backend.device)
        if isinstance(v, torch.Tensor)
        else v
        for k, v in given.items()
    }
    first = [on.pop(name) for name in ("base", "tensors", "weights")]
    with pytest.raises(error, match=f"mergeme::{OP}: .*{message}"):
        backend.op(OP)(*first, **on)


@settings(max_examples=60)
@given(
    n=st.integers(1, 3000),
    offset=st.integers(0, 5000),
    row_length=st.integers(1, 700),
    num_models=st.integers(1, 4),
    axis=st.sampled_from(AXES),
    with_base=st.booleans(),
    cut=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_backends_and_chunks_agree_to_the_bit(
    n, offset, row_length, num_models, axis, with_base, cut, dtype, seed
):
    base, tensors, weights, options = make(
        n, offset, row_length, num_models, axis, dtype, seed=seed
    )
    base = base if with_base else None
    out = CPU.op(OP)(base, tensors, weights, **options)
    assert torch.equal(out, SIMT.op(OP)(base, tensors, weights, **options))
    at, parts = int(cut * n), []
    for start, end in ((0, at), (at, n)):
        part = None if base is None else base[start:end]
        options["offset"] = offset + start
        parts.append(CPU.op(OP)(part, [t[start:end] for t in tensors], weights, **options))
    assert torch.equal(out, torch.cat(parts))


def test_agrees_with_the_plain_ops():
    base, tensors, weights, _ = make(5000, 0, 1, 3, "all", torch.bfloat16)
    out = mergeme_ext.combine_rows(None, tensors, weights)
    assert torch.equal(out, mergeme_ext.weighted_sum(tensors, weights[0]))
    assert torch.equal(mergeme_ext.combine_rows(base, [base, base], weights[:, :2]), base)


def test_threads_change_no_bit():
    base, tensors, weights, options = make(2**18 + 3, 77, 1001, 2, "row", torch.bfloat16)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(CPU.op(OP)(base, tensors, weights, **options))
    torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("axis", AXES)
def test_thread_order_changes_no_bit(schedule, axis):
    base, tensors, weights, options = make(2000, 5, 33, 2, axis, torch.float32)
    expected = SIMT.op(OP)(base, tensors, weights, **options)
    with schedule:
        assert torch.equal(SIMT.op(OP)(base, tensors, weights, **options), expected)


@pytest.mark.slow
def test_compiles():
    base, tensors, weights, options = make(2000, 5, 33, 2, "row", torch.float32)
    compiled = torch.compile(mergeme_ext.combine_rows, fullgraph=True)
    expected = mergeme_ext.combine_rows(base, tensors, weights, **options)
    assert torch.equal(compiled(base, tensors, weights, **options), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("axis", AXES)
def test_on_gpu(axis):
    base, tensors, weights, options = make(10**6 + 3, 77, 1001, 3, axis, torch.bfloat16)
    on_gpu = base.cuda(), [t.cuda() for t in tensors]
    with pytest.raises(ValueError, match="expected weights on cuda:0, got cpu"):
        mergeme_ext.combine_rows(*on_gpu, weights, **options)
    with torch.cuda.stream(torch.cuda.Stream()):
        out = mergeme_ext.combine_rows(*on_gpu, weights.cuda(), **options)
        torch.cuda.current_stream().synchronize()
    assert torch.equal(out.cpu(), mergeme_ext.combine_rows(base, tensors, weights, **options))

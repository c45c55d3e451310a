import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mergeme_ext
from python_tests.references.magnitude_threshold import kept as kept_by_cut
from python_tests.references.magnitude_threshold import task_vector
from python_tests.references.masked_norms import masked_norms as reference
from python_tests.references.philox import keeps
from python_tests.support.backends import BACKENDS, CPU, SCHEDULES, SIMT, backends_with_errors
from python_tests.support.merge_inputs import (
    DTYPES,
    TOY_KEY,
    misaligned,
    models,
    toy,
    transposed,
)

OP = "masked_norms"
MASKS = ["all", "magnitude", "random", "band"]
# (shape, number of models): empty, one element, one model, odd sizes, three blocks, many models.
CASES = [((0,), 2), ((1,), 3), ((33, 65), 1), ((2, 0, 4), 2), ((8195,), 3), ((7, 11), 20)]


def selection_for(mask, base, tensors):
    if mask == "magnitude":
        keep = [int(0.6 * base.numel())] * len(tensors)
        return mergeme_ext.magnitude_threshold(base, tensors, keep)
    if mask == "band":
        keep = [int(share * base.numel()) for share in (0.8, 0.1) for _ in tensors]
        cuts = mergeme_ext.magnitude_threshold(base, [*tensors, *tensors], keep)
        return torch.cat(cuts.chunk(2), 1)
    rows = [[0.2 + 0.6 * m / len(tensors), 0.0] for m in range(len(tensors))]
    return torch.tensor(rows, dtype=torch.float64, device=base.device)


def kept_for(mask, base, tensors, selection, key):
    if mask == "magnitude":
        return [kept_by_cut(base, t, row) for t, row in zip(tensors, selection.cpu(), strict=True)]
    if mask == "band":
        return [
            kept_by_cut(base, t, row[:2]) & ~kept_by_cut(base, t, row[2:])
            for t, row in zip(tensors, selection.cpu(), strict=True)
        ]
    n = range(base.numel())
    if mask == "random":
        rows = [keeps(key, m, n, p) for m, p in enumerate(selection[:, 0].tolist())]
        return [torch.from_numpy(row) for row in rows]
    return [torch.ones(base.numel(), dtype=torch.bool)] * len(tensors)


def check(backend, mask, base, tensors, key=99):
    selection = selection_for(mask, base, tensors)
    out = backend.op(OP)(base, tensors, selection, mask=mask, key=key).cpu()
    assert out.dtype == torch.float64 and out.shape == (len(tensors), 6)
    expected = reference(base, tensors, kept_for(mask, base, tensors, selection, key))
    # Sums of n non-negative float64 terms; a square is rounded once, and a root at the end.
    n, u = base.numel() + 4, 2.0**-53
    assert ((out - expected).abs() <= n * u / (1 - n * u) * expected).all()
    assert torch.equal(out[:, 2::3], expected[:, 2::3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape, num_models", CASES)
def test_matches_reference(backend, dtype, mask, shape, num_models):
    check(backend, mask, *models(shape, dtype, num_models, device=backend.device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [transposed, misaligned])
def test_layouts(backend, dtype, layout):
    base, tensors = models((33, 65), dtype, device=backend.device)
    check(backend, "random", layout(base), [layout(t) for t in tensors])


def test_worked_example():
    base, tensors = toy()
    selection = torch.tensor([[0.5, 0.0]] * 3, dtype=torch.float64)
    norms = mergeme_ext.masked_norms(base, tensors, selection, mask="random", key=TOY_KEY)
    factors = (norms[:, 0] / norms[:, 3]).tolist()
    assert factors == pytest.approx([1.65, 1.2, 2.692308], abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration_and_gradient(backend):
    base, tensors = models((3, 4), torch.float32, device=backend.device)
    selection = selection_for("random", base, tensors)
    arguments = {"mask": "random", "key": 3}
    torch.library.opcheck(backend.op(OP), (base, tensors, selection), arguments)
    base.requires_grad_()
    out = backend.op(OP)(base, tensors, selection, **arguments)
    with pytest.raises(NotImplementedError, match=f"mergeme::{OP}"):
        out.sum().backward()


BAD_INPUTS = [
    (lambda a: a.update(base=a["base"].int()), TypeError, "expected base to be float16.*got int32"),
    (lambda a: a.update(tensors=[]), ValueError, "expected tensors to hold at least one tensor"),
    (lambda a: a.update(selection=a["selection"].float()), TypeError, "selection to be float64"),
    (lambda a: a.update(selection=a["selection"][:1]), ValueError, r"shape \[2, 2\], got \[1, 2\]"),
    (
        lambda a: a.update(mask="odd"),
        ValueError,
        "mask to be all, magnitude, random or band, got odd",
    ),
]


def run(backend, base, tensors, selection, mask, key):
    return backend.op(OP)(base, tensors, selection, mask=mask, key=key)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spoil, error, message", BAD_INPUTS)
def test_rejects_bad_input(backend, spoil, error, message):
    base, tensors = models((3, 4), torch.float32, 2, device=backend.device)
    selection = selection_for("random", base, tensors)
    arguments = {"base": base, "tensors": tensors, "selection": selection, "mask": "all", "key": 0}
    spoil(arguments)
    with pytest.raises(error, match=f"mergeme::{OP}: .*{message}"):
        run(backend, **arguments)


@pytest.mark.parametrize("backend, error", backends_with_errors(ValueError))
@pytest.mark.parametrize("probability", [-0.1, 1.5, math.nan])
def test_rejects_probability_out_of_range(backend, error, probability):
    base, tensors = models((3, 4), torch.float32, 2)
    selection = torch.tensor([[0.5, 0.0], [probability, 0.0]], dtype=torch.float64)
    with pytest.raises(error, match=r"probabilities in \[0, 1\].* for model 1|device assert"):
        run(backend, base, tensors, selection, "random", 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_shows(backend):
    base = torch.zeros(5000, device=backend.device)
    tensor = torch.ones(5000, device=backend.device)
    tensor[4321] = math.nan
    selection = torch.tensor([[2.0, 0.0]], dtype=torch.float64, device=backend.device)
    assert run(backend, base, [tensor], selection, "magnitude", 0).isnan().all()


@settings(max_examples=25)
@given(
    n=st.integers(1, 9000),
    num_models=st.integers(1, 4),
    mask=st.sampled_from(MASKS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_backends_agree_to_the_bit(n, num_models, mask, dtype, seed):
    base, tensors = models((n,), dtype, num_models, seed)
    arguments = base, tensors, selection_for(mask, base, tensors), mask, seed
    assert torch.equal(run(CPU, *arguments), run(SIMT, *arguments))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype):
    base, tensors = models((2**18 + 3,), dtype)
    selection, results = selection_for("random", base, tensors), []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(CPU, base, tensors, selection, "random", 7))
    torch.set_num_threads(before)
    assert torch.equal(*results)
    assert results[0][0, 2] == task_vector(base, tensors[0]).abs().max()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("mask", ["magnitude", "random"])
def test_thread_order_changes_no_bit(schedule, mask):
    base, tensors = models((8195,), torch.float32, 2)
    arguments = base, tensors, selection_for(mask, base, tensors), mask, 3
    expected = run(SIMT, *arguments)
    with schedule:
        assert torch.equal(run(SIMT, *arguments), expected)


@pytest.mark.slow
def test_compiles():
    base, tensors = models((33, 65), torch.float32)
    selection = selection_for("random", base, tensors)
    compiled = torch.compile(mergeme_ext.masked_norms, fullgraph=True)
    expected = mergeme_ext.masked_norms(base, tensors, selection, mask="random", key=1)
    assert torch.equal(compiled(base, tensors, selection, mask="random", key=1), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mask", MASKS)
def test_on_gpu(mask):
    base, tensors = models((1500, 1001), torch.bfloat16)
    selection = selection_for(mask, base, tensors)
    on_gpu = base.cuda(), [t.cuda() for t in tensors]
    with pytest.raises(ValueError, match="expected selection on cuda:0, got cpu"):
        mergeme_ext.masked_norms(*on_gpu, selection)
    with torch.cuda.stream(torch.cuda.Stream()):
        norms = mergeme_ext.masked_norms(*on_gpu, selection.cuda(), mask=mask, key=3)
        torch.cuda.current_stream().synchronize()
    expected = mergeme_ext.masked_norms(base, tensors, selection, mask=mask, key=3)
    assert torch.equal(norms.cpu(), expected)

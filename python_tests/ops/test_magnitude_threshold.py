import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mergeme_ext
from python_tests.references.magnitude_threshold import kept, task_vector
from python_tests.references.magnitude_threshold import magnitude_threshold as reference
from python_tests.support.backends import BACKENDS, CPU, SCHEDULES, SIMT
from python_tests.support.merge_inputs import DTYPES, mergeme, misaligned, models, toy, transposed

OP = "magnitude_threshold"
# (shape, number of models): empty, one element, one model, odd sizes, two blocks, many models.
CASES = [((0,), 2), ((1,), 3), ((33, 65), 1), ((2, 0, 4), 2), ((8195,), 3), ((7, 11), 20)]


def check(backend, base, tensors, keep):
    cuts = backend.op(OP)(base, tensors, keep)
    assert cuts.dtype == torch.float64 and cuts.shape == (len(tensors), 2)
    assert torch.equal(cuts.cpu(), reference(base, tensors, keep))
    for tensor, row, count in zip(tensors, cuts.cpu(), keep, strict=True):
        assert kept(base, tensor, row).sum() == count


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, num_models", CASES)
def test_matches_reference(backend, dtype, shape, num_models):
    base, tensors = models(shape, dtype, num_models, device=backend.device)
    n = base.numel()
    keep = [int(f * n) for f in ([0.2, 0.8, 0.5] * num_models)[:num_models]]
    check(backend, base, tensors, keep)
    check(backend, base, tensors, [n, *[0] * (num_models - 1)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [transposed, misaligned])
def test_layouts(backend, dtype, layout):
    base, tensors = models((33, 65), dtype, device=backend.device)
    check(backend, layout(base), [layout(t) for t in tensors], [400, 1, 2000])


def check_large(base, tensors, keep):
    """Like check, on the CPU, with torch's stable sort for the reference."""
    cuts = CPU.op(OP)(base, tensors, keep)
    for tensor, cut, count in zip(tensors, cuts.tolist(), keep, strict=True):
        x = task_vector(base, tensor).abs()
        last = torch.sort(x, descending=True, stable=True).indices[count - 1].item()
        assert cut == [x[last].item(), last + 1]


# 160,000 elements are too many to collect at once, so that digits are counted; with few different
# magnitudes even the last digit leaves too many, and ties are located by counting. 300,000 are
# sampled first.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", [2, 300, 2**20])
@pytest.mark.parametrize("n", [160_001, 300_007])
def test_large_tensors_on_cpu(dtype, values, n):
    g = torch.Generator().manual_seed(1)
    base = torch.zeros(n, dtype=dtype)
    numbers = [torch.randint(-values, values, (n,), generator=g) for _ in range(2)]
    tensors = [(k.double() / values).to(dtype) for k in numbers]
    tensors.append(torch.full_like(base, -0.5))  # one magnitude only
    check_large(base, tensors, [32_000, 128_000, 70_000])
    check_large(base, tensors, [n, 1, n - 1])


def test_samples_that_mislead():
    """Runs of 16 in every 73 elements are looked at first; here they are unlike the others."""
    tensor = torch.linspace(0.1, 0.2, 300_000)
    looked_at = torch.arange(300_000) % 73 < 16
    larger = torch.where(looked_at, 9.0 + tensor, tensor)
    smaller = torch.where(looked_at, tensor / 9, tensor)
    check_large(torch.zeros_like(tensor), [larger, smaller], [100_000, 200_000])


def test_many_ties_on_simt():
    base = torch.zeros(9001)  # three tiles; the tie ends in the last
    base[::3] = 1.0
    check(SIMT, torch.zeros(9001), [base, -base, base * 0], [2950, 3005, 8999])


def test_worked_examples():
    base, tensors = toy()
    cuts = mergeme_ext.magnitude_threshold(base, tensors, [3, 3, 3])
    assert [t for t, _ in cuts.tolist()] == [0.5, 0.375, 0.375]
    trimmed = [
        torch.where(kept(base, t, c), t - base, 0) for t, c in zip(tensors, cuts, strict=True)
    ]
    assert [t.tolist() for t in trimmed] == [
        [0.5, 0, 0, 0.75, -0.625, 0],
        [0, -0.375, 1, 0, -0.5, 0],
        [0, 0.625, 0, -0.75, 0.375, 0],
    ]
    base, tensors = mergeme()
    cuts = mergeme_ext.magnitude_threshold(base, tensors, [4, 4, 4])
    dropped = [(~kept(base, t, c)).nonzero().item() for t, c in zip(tensors, cuts, strict=True)]
    assert dropped == [2, 3, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration_and_gradient(backend):
    base, tensors = models((3, 4), torch.float32, device=backend.device)
    torch.library.opcheck(backend.op(OP), (base, tensors, [3, 4, 5]))
    base.requires_grad_()
    torch.library.opcheck(
        backend.op(OP),
        (base, tensors, [3, 4, 5]),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    with pytest.raises(NotImplementedError, match=f"mergeme::{OP}"):
        backend.op(OP)(base, tensors, [3, 4, 5]).sum().backward()


BAD_INPUTS = [
    (lambda b, t, k: (b.int(), t, k), TypeError, "expected base to be float16.*got int32"),
    (lambda b, t, k: (b, [], []), ValueError, "expected tensors to hold at least one tensor"),
    (
        lambda b, t, k: (b, [t[0], t[1].half()], k),
        TypeError,
        r"tensors\[1\] to be float32.*float16",
    ),
    (lambda b, t, k: (b, [t[0], t[1][0]], k), ValueError, r"tensors\[1\] of shape \[3, 4\].*\[4\]"),
    (lambda b, t, k: (b, t, [3]), ValueError, "expected keep to hold 2 counts.*got 1"),
    (lambda b, t, k: (b, t, [3, -1]), ValueError, r"expected keep\[1\] in \[0, 12\], got -1"),
    (lambda b, t, k: (b, t, [13, 3]), ValueError, r"expected keep\[0\] in \[0, 12\], got 13"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spoil, error, message", BAD_INPUTS)
def test_rejects_bad_input(backend, spoil, error, message):
    base, tensors = models((3, 4), torch.float32, 2, device=backend.device)
    with pytest.raises(error, match=f"mergeme::{OP}: .*{message}"):
        backend.op(OP)(*spoil(base, tensors, [3, 4]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_always_kept(backend, dtype):
    nan, inf = math.nan, math.inf
    tensor = torch.tensor([1.0, nan, -2.0, inf, -nan, 0.0], dtype=dtype, device=backend.device)
    cuts = backend.op(OP)(torch.zeros_like(tensor), [tensor] * 6, [0, 1, 2, 3, 4, 6])
    assert cuts.tolist() == [[inf, 0], [inf, 0], [inf, 0], [inf, 4], [2, 3], [0, 6]]


@settings(max_examples=30)
@given(data=st.data(), n=st.integers(1, 100), dtype=st.sampled_from(DTYPES))
def test_keeps_the_largest_exactly(data, n, dtype):
    """On a coarse grid, so that ties are everywhere."""
    grid = st.lists(st.integers(-6, 6), min_size=n, max_size=n)
    base, tensor = (torch.tensor(data.draw(grid), dtype=dtype) / 8 for _ in range(2))
    count = data.draw(st.integers(0, n))
    cuts = CPU.op(OP)(base, [tensor], [count])
    assert torch.equal(cuts, SIMT.op(OP)(base, [tensor], [count]))
    mask = kept(base, tensor, cuts[0])
    x = task_vector(base, tensor).abs()
    assert mask.sum() == count
    assert not count or count == n or x[mask].min() >= x[~mask].max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(dtype):
    base, tensors = models((2**19 + 3,), dtype)
    keep, results, before = [100_000, 400_000, 5], [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(CPU.op(OP)(base, tensors, keep))
    torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_thread_order_changes_no_bit(schedule):
    base, tensors = models((4500,), torch.float32, 2)
    expected = SIMT.op(OP)(base, tensors, [900, 4000])
    with schedule:
        assert torch.equal(SIMT.op(OP)(base, tensors, [900, 4000]), expected)


@pytest.mark.slow
def test_compiles():
    base, tensors = models((33, 65), torch.float32)
    compiled = torch.compile(mergeme_ext.magnitude_threshold, fullgraph=True)
    expected = mergeme_ext.magnitude_threshold(base, tensors, [5, 6, 7])
    assert torch.equal(compiled(base, tensors, [5, 6, 7]), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_gpu():
    base, tensors = models((1500, 1001), torch.bfloat16)
    keep = [300_000, 1_200_000, 1]
    on_gpu = [t.cuda() for t in tensors]
    with pytest.raises(ValueError, match=r"expected tensors\[1\] on cuda:0, got cpu"):
        mergeme_ext.magnitude_threshold(base.cuda(), [on_gpu[0], tensors[1]], keep[:2])
    with torch.cuda.stream(torch.cuda.Stream()):
        cuts = mergeme_ext.magnitude_threshold(base.cuda(), on_gpu, keep)
        torch.cuda.current_stream().synchronize()
    assert torch.equal(cuts.cpu(), mergeme_ext.magnitude_threshold(base, tensors, keep))

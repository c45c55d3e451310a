import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from python_tests.references import grouped_matmul as references
from python_tests.support.backends import BACKENDS, CPU, SCHEDULES, SIMT, backends_with_errors
from python_tests.support.tolerance import assert_within_rounding

LAYOUTS = ["nt", "nn", "tn"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (tokens of each expert, inner, outer): M and E follow. inner is K (nt, nn) or N1 (tn).
CASES = {
    "no-tokens": ([0, 0], 5, 3),
    "one": ([1], 1, 1),
    "edges": ([0, 1, 15, 0, 17], 7, 33),
    "tiles": ([127, 0, 129], 33, 65),
    "one-expert": ([70], 16, 24),
    "aligned": ([3, 0, 130, 40], 40, 72),
    "no-inner": ([2, 3], 0, 4),
    "no-outer": ([2, 3], 4, 0),
}


def draw(shape, dtype, generator):
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def offsets_of(counts):
    return torch.tensor([0, *counts]).cumsum(0).int()


def make(layout, counts, inner, outer, dtype, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    a = draw((sum(counts), inner), dtype, g)
    shape = {
        "nt": (len(counts), outer, inner),
        "nn": (len(counts), inner, outer),
        "tn": (sum(counts), outer),
    }[layout]
    b = draw(shape, dtype, g)
    return a.to(device), b.to(device), offsets_of(counts).to(device)


def op(backend, layout):
    return backend.op(f"grouped_matmul_{layout}")


def check(out, layout, args):
    value, magnitude = getattr(references, f"grouped_matmul_{layout}")(*args)
    terms = args[0].shape[0] if layout == "tn" else args[0].shape[1]
    assert out.shape == value.shape and out.dtype == args[0].dtype and out.is_contiguous()
    assert_within_rounding(out, value, magnitude, terms=max(terms, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_reference(backend, layout, case, dtype):
    args = make(layout, *CASES[case], dtype, backend.device)
    check(op(backend, layout)(*args), layout, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_no_group(backend, layout, dtype):
    a, b, offsets = make(layout, [5, 12, 7], 16, 24, dtype, backend.device)
    a[17:] = float("nan")  # whatever is in them
    if layout == "tn":
        b[17:] = float("nan")
    offsets = offsets.clamp(max=17)
    out = op(backend, layout)(a, b, offsets)
    if layout == "tn":
        assert (out[2] == 0).all()
        assert torch.equal(out, op(backend, layout)(a[:17], b[:17], offsets))
    else:
        assert (out[17:] == 0).all()
        assert torch.equal(out[:17], op(backend, layout)(a[:17], b, offsets))


def misaligned(t):
    """The same values, starting one element after an aligned address."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_and_misaligned_inputs(backend, layout, dtype):
    a, b, offsets = make(layout, [5, 12], 16, 24, dtype, backend.device)
    expected = op(backend, layout)(a, b, offsets)
    strided = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (a, b)]
    wide_offsets = torch.stack([offsets, offsets], 1)[:, 0]
    assert not strided[0].is_contiguous() and not wide_offsets.is_contiguous()
    assert torch.equal(op(backend, layout)(*strided, wide_offsets), expected)
    args = (misaligned(a), misaligned(b), offsets)  # may take another kernel: other bits
    check(op(backend, layout)(*args), layout, args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_magnitudes_over_many_orders(backend):
    for layout in LAYOUTS:
        a, b, offsets = make(layout, [9, 20], 24, 16, torch.float32, backend.device)
        a = a * 10.0 ** torch.randint(-12, 12, a.shape).to(a.device)
        args = (a, b * 10.0 ** torch.randint(-12, 12, b.shape).to(b.device), offsets)
        check(op(backend, layout)(*args), layout, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_its_row_and_group(backend, dtype):
    a, b, offsets = make("nt", [2, 3, 20], 16, 8, dtype, backend.device)
    a[3, 5] = float("nan")
    out = op(backend, "nt")(a, b, offsets)
    assert out[3].isnan().all() and not out[:3].isnan().any() and not out[4:].isnan().any()
    c = draw((25, 8), dtype, torch.Generator().manual_seed(1)).to(backend.device)
    out = op(backend, "tn")(a, c, offsets)
    assert out[1, 5].isnan().all() and out.isnan().sum() == 8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_registration_and_gradient(backend, layout):
    a, b, offsets = make(layout, [2, 0, 3], 4, 3, torch.float64, backend.device)
    torch.library.opcheck(op(backend, layout), (a, b, offsets))
    args = (a.requires_grad_(), b.requires_grad_(), offsets)
    torch.library.opcheck(op(backend, layout), args)
    torch.autograd.gradcheck(op(backend, layout), args, fast_mode=backend.interpreted)
    torch.autograd.gradgradcheck(op(backend, layout), args, fast_mode=backend.interpreted)


BAD_INPUTS = [
    ("nt", 0, lambda t: t.int(), TypeError, "expected a to be float16.*got int32"),
    ("nt", 1, lambda t: t.half(), TypeError, "expected b to be float32, got float16"),
    ("nt", 2, lambda t: t.long(), TypeError, "expected expert_offsets to be int32, got int64"),
    ("nt", 2, lambda t: t[None], ValueError, r"expert_offsets of shape \[E \+ 1\], got \[1, 3\]"),
    ("nt", 2, lambda t: t[:1], ValueError, r"\[E \+ 1\] with E >= 1, got \[1\]"),
    ("nt", 0, lambda t: t[0], ValueError, r"expected a of shape \[M, K\], got \[4\]"),
    ("nt", 1, lambda t: t[0], ValueError, r"expected b of shape \[E, N, K\], got \[3, 4\]"),
    ("nt", 1, lambda t: t[:, :, :3], ValueError, r"b of shape \[2, 3, 4\], got \[2, 3, 3\]"),
    ("nn", 1, lambda t: t[0], ValueError, r"expected b of shape \[E, K, N\], got \[4, 3\]"),
    ("nn", 1, lambda t: t[:1], ValueError, r"expected b of shape \[2, 4, 3\], got \[1, 4, 3\]"),
    ("tn", 0, lambda t: t[0], ValueError, r"expected a of shape \[M, N1\], got \[4\]"),
    ("tn", 1, lambda t: t[0], ValueError, r"expected b of shape \[M, N2\], got \[3\]"),
    ("tn", 1, lambda t: t[:-1], ValueError, r"expected b of shape \[5, 3\], got \[4, 3\]"),
]


@pytest.mark.parametrize("backend", [CPU, SIMT])
@pytest.mark.parametrize("layout, place, spoil, error, message", BAD_INPUTS)
def test_rejects_bad_input(backend, layout, place, spoil, error, message):
    args = list(make(layout, [2, 3], 4, 3, torch.float32))
    args[place] = spoil(args[place])
    with pytest.raises(error, match=f"mergeme::grouped_matmul_{layout}: .*{message}"):
        op(backend, layout)(*args)


BAD_OFFSETS = [
    ([1, 2, 5], "to start at 0, got 1", "offsets"),
    ([0, 4, 3, 5], "to be non-decreasing, got 3 after 4 at position 2", "<="),
    ([0, 2, 6], "to end at most at 5, got 6", "offsets"),
]


@pytest.mark.parametrize("backend, error", backends_with_errors(ValueError))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offsets, message, asserted", BAD_OFFSETS)
def test_rejects_offsets_that_are_no_boundaries(backend, error, layout, offsets, message, asserted):
    a, b, _ = make(layout, [5] + [0] * (len(offsets) - 2), 4, 3, torch.float32)
    args = (a, b, torch.tensor(offsets, dtype=torch.int32))
    expected = f"expected expert_offsets {message}|device assert: .*{asserted}"
    with pytest.raises(error, match=expected):
        op(backend, layout)(*args)


@settings(max_examples=40)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    inner=st.integers(0, 70),
    outer=st.integers(0, 70),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape_matches_reference(counts, inner, outer, layout, dtype, seed):
    args = make(layout, counts, inner, outer, dtype, seed=seed)
    check(op(CPU, layout)(*args), layout, args)


@pytest.mark.parametrize("backend", [CPU, SIMT])
@settings(max_examples=10)
@given(counts=st.lists(st.integers(0, 20), min_size=2, max_size=5), seed=st.integers(0, 2**31))
def test_permuting_experts_permutes_results(backend, counts, seed):
    a, b, offsets = make("nt", counts, 9, 5, torch.float32, seed=seed)
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed))
    groups = list(a.split(counts))
    moved = torch.cat([groups[i] for i in order])
    out = op(backend, "nt")(moved, b[order], offsets_of([counts[i] for i in order]))
    groups = list(op(backend, "nt")(a, b, offsets).split(counts))
    assert torch.equal(out, torch.cat([groups[i] for i in order]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(layout, dtype):
    args = make(layout, [1, 0, 150, 40], 300, 130, dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(op(CPU, layout)(*args))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)
    check(results[0], layout, args)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_thread_order_changes_no_bit(schedule, layout, dtype):
    args = make(layout, [3, 70], 40, 24, dtype)
    expected = op(SIMT, layout)(*args)
    with schedule:
        assert torch.equal(op(SIMT, layout)(*args), expected)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [CPU, SIMT])
def test_compiles(backend):
    def step(a, b, offsets):
        return op(backend, "nt")(a, b, offsets).relu().sum()

    a, b, offsets = make("nt", [2, 0, 3], 8, 6, torch.float32)
    grads = []
    for function in (step, torch.compile(step, fullgraph=True)):
        x, w = a.clone().requires_grad_(), b.clone().requires_grad_()
        out = function(x, w, offsets)
        grads.append((out.detach(), *torch.autograd.grad(out, (x, w))))
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_joins_the_current_stream():
    args = make("nt", [200, 300], 256, 256, torch.bfloat16, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = torch.ops.mergeme.grouped_matmul_nt(*args)
    torch.cuda.current_stream().wait_stream(stream)
    check(out, "nt", args)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("inner", [8, 9])  # tensor cores, portable
def test_more_than_2_31_elements(inner, device="cuda"):
    outer = 2**31 // (2 * inner) + 24  # the last of three experts begins beyond 2^31 elements
    generator = torch.Generator().manual_seed(0)
    a = draw((5, inner), torch.bfloat16, generator).to(device)
    b = torch.zeros(3, outer, inner, dtype=torch.bfloat16, device=device)
    places = torch.tensor([0, 1, outer // 2, outer - 1])
    b[2, places] = draw((4, inner), torch.bfloat16, generator).to(device)
    offsets = torch.tensor([0, 0, 0, 5], dtype=torch.int32, device=device)
    out = torch.ops.mergeme.grouped_matmul_nt(a, b, offsets)
    value, magnitude = references.grouped_matmul_nt(a, b[2:, places], offsets[[0, 3]])
    assert_within_rounding(out[:, places], value, magnitude, terms=inner)
    assert out.count_nonzero() == out[:, places].count_nonzero()

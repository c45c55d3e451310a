import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from python_tests.references import grouped_matmul_fp8 as references
from python_tests.support.backends import BACKENDS, CPU, SCHEDULES, SIMT
from python_tests.support.tolerance import assert_within_rounding

OP = "grouped_matmul_fp8"
E4M3 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows of each expert, K, N.
CASES = {
    "no-rows": ([0, 0], 5, 3),
    "one": ([1], 1, 1),
    "edges": ([0, 1, 15, 0, 17], 127, 33),
    "blocks": ([3, 20], 256, 256),
    "tiles": ([127, 0, 129], 129, 130),
    "aligned": ([3, 0, 70, 40], 384, 192),
    "deep": ([2, 9], 700, 64),
    "wgmma": ([0, 1, 15, 64, 129], 272, 136),  # tails along all sides of tiles of 128
    "no-inner": ([2, 3], 0, 4),
    "no-outer": ([2, 3], 4, 0),
}


def draw(shape, generator):
    """e4m3 numbers of every size, and those that e4m3 has no exponent for."""
    code = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    code = torch.where(code % 128 == 127, code - 1, code)  # NaN has its own test
    return code.view(E4M3)


def offsets_of(counts):
    return torch.tensor([0, *counts]).cumsum(0).int()


def blocks(n):
    return -(-n // 128)


def make(counts, k, n, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    m, e = sum(counts), len(counts)
    a, b = draw((m, k), g), draw((e, n, k), g)
    scales = [
        torch.rand(shape, generator=g) * 2.0 ** torch.randint(-12, 3, shape, generator=g)
        for shape in ((m, blocks(k)), (e, blocks(n), blocks(k)))
    ]
    return tuple(t.to(device) for t in (a, scales[0], b, scales[1], offsets_of(counts)))


def lost_on(device):
    """What sums of e4m3 products may lose beyond float32's rounding, relative to their magnitude.

    Hopper's tensor cores align 32 products and the sum before them to the largest of these and keep
    about 14 bits (DeepSeek-V3's report, 3.3.2): each of the 4 * 33 addends of a block of 128 loses
    less than 2^-13 of a number that the magnitude bounds. The interpreter of PTX keeps float32.
    """
    few = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return 4 * 33 * 2.0**-13 if few else 0.0


def check(out, args, dtype):
    value, magnitude = references.grouped_matmul_fp8(*args)
    assert out.shape == value.shape and out.dtype == dtype and out.is_contiguous()
    # A number passes through at most 128 roundings in its block, the scales' product, and one for
    # each block after it; on the way to float64 nothing is lost.
    k = args[0].shape[1]
    terms = min(k, 128) + 1 + blocks(k) + lost_on(out.device) * 2**24  # roundings by 2^-24
    assert_within_rounding(out, value, magnitude, terms=terms)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(backend, case, dtype):
    args = make(*CASES[case], backend.device)
    if dtype == torch.float16:  # whose range is small
        args[3].mul_(2.0**-12)
    check(backend.op(OP)(*args, dtype=dtype), args, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_code_decodes_exactly(backend):
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3)
    ones = torch.ones(1, 1)
    offsets = offsets_of([1])
    one = torch.ones(1, 1).to(E4M3)
    b = codes.view(1, 256, 1)
    args = [t.to(backend.device) for t in (one, ones, b, torch.ones(1, 2, 1), offsets)]
    out = backend.op(OP)(*args, dtype=torch.float32).cpu()
    assert torch.equal(out[0].nan_to_num(777), codes.float().nan_to_num(777))
    a = codes.view(256, 1)
    offsets = offsets_of([256])
    b = one.view(1, 1, 1)
    args = [t.to(backend.device) for t in (a, torch.ones(256, 1), b, ones.view(1, 1, 1), offsets)]
    out = backend.op(OP)(*args, dtype=torch.float32).cpu()
    assert torch.equal(out[:, 0].nan_to_num(777), codes.float().nan_to_num(777))


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_scale_goes_to_its_block(backend):
    """Ones everywhere, and scales that are powers of two: every sum is exact, and tells which."""
    m, k, n, e = 5, 300, 260, 2
    ones = [torch.ones(shape).to(E4M3) for shape in ((m, k), (e, n, k))]
    g = torch.Generator().manual_seed(0)
    a_scale = 2.0 ** torch.randint(0, 4, (m, blocks(k)), generator=g)
    b_scale = 2.0 ** torch.randint(0, 4, (e, blocks(n), blocks(k)), generator=g)
    args = (ones[0], a_scale, ones[1], b_scale, offsets_of([2, 3]))
    args = tuple(t.to(backend.device) for t in args)
    out = backend.op(OP)(*args, dtype=torch.float32)
    assert torch.equal(out.double().cpu(), references.grouped_matmul_fp8(*args)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_no_group(backend):
    a, a_scale, b, b_scale, offsets = make([5, 12, 7], 160, 24, backend.device)
    a[17:] = float("nan")  # whatever is in them
    a_scale[17:] = float("nan")
    offsets = offsets.clamp(max=17)
    out = backend.op(OP)(a, a_scale, b, b_scale, offsets, dtype=torch.float32)
    assert (out[17:] == 0).all()
    expected = backend.op(OP)(a[:17], a_scale[:17], b, b_scale, offsets, dtype=torch.float32)
    assert torch.equal(out[:17], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row_and_column(backend):
    for place, where in (("a", (3,)), ("b", (slice(2, 5), 7))):
        args = make([2, 3, 20], 260, 40, backend.device)
        if place == "a":
            args[0][3, 200] = float("nan")
        else:
            args[2][1, 7, 3] = float("nan")
        out = backend.op(OP)(*args, dtype=torch.bfloat16)
        assert out[where].isnan().all() and out.isnan().sum() == out[where].numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_misaligned_inputs(backend):
    args = make([5, 12], 144, 24, backend.device)
    expected = backend.op(OP)(*args, dtype=torch.float32)
    strided = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in args[:4]]
    wide_offsets = torch.stack([args[4], args[4]], 1)[:, 0]
    assert torch.equal(backend.op(OP)(*strided, wide_offsets, dtype=torch.float32), expected)
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in args[:4]]
    out = backend.op(OP)(*shifted, args[4], dtype=torch.float32)  # may take another kernel
    check(out, args, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(backend):
    a, a_scale, b, b_scale, offsets = make([2, 0, 3], 140, 3, backend.device)
    # torch's own test of schemas multiplies the inputs, which it cannot in e4m3.
    checks = ("test_autograd_registration", "test_faketensor")
    args = (a, a_scale, b, b_scale, offsets)
    torch.library.opcheck(backend.op(OP), args, {"dtype": torch.float32}, test_utils=checks)
    out = backend.op(OP)(a, a_scale.requires_grad_(), b, b_scale, offsets, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match=f"mergeme::{OP}: e4m3 weights are for inference"):
        out.sum().backward()


BAD_INPUTS = [
    (0, lambda t: t.float(), TypeError, "expected a to be float8_e4m3fn, got float32"),
    (2, lambda t: t.half(), TypeError, "expected b to be float8_e4m3fn, got float16"),
    (1, lambda t: t.half(), TypeError, "expected a_scale to be float32, got float16"),
    (3, lambda t: t.double(), TypeError, "expected b_scale to be float32, got float64"),
    (4, lambda t: t.long(), TypeError, "expected expert_offsets to be int32, got int64"),
    (0, lambda t: t[0], ValueError, r"expected a of shape \[M, K\], got \[140\]"),
    (2, lambda t: t[0], ValueError, r"expected b of shape \[E, N, K\], got \[3, 140\]"),
    (2, lambda t: t[..., 1:], ValueError, r"\[E, N, 140\] with E >= 1, got \[2, 3, 139\]"),
    (1, lambda t: t[:, :1], ValueError, r"expected a_scale of shape \[5, 2\], got \[5, 1\]"),
    (3, lambda t: t[:, :, :1], ValueError, r"b_scale of shape \[2, 1, 2\], got \[2, 1, 1\]"),
    (4, lambda t: t[1:], ValueError, r"expected expert_offsets of shape \[3\], got \[2\]"),
]


@pytest.mark.parametrize("backend", [CPU, SIMT])
@pytest.mark.parametrize("place, spoil, error, message", BAD_INPUTS)
def test_rejects_bad_input(backend, place, spoil, error, message):
    args = list(make([2, 3], 140, 3))
    args[place] = spoil(args[place])
    with pytest.raises(error, match=f"mergeme::{OP}: .*{message}"):
        backend.op(OP)(*args, dtype=torch.bfloat16)


@pytest.mark.parametrize("backend", [CPU, SIMT])
def test_rejects_bad_dtype(backend):
    with pytest.raises(
        TypeError, match="expected dtype to be float16, bfloat16 or float32, got float64"
    ):
        backend.op(OP)(*make([2, 3], 140, 3), dtype=torch.float64)


BAD_OFFSETS = [
    ([1, 2, 5], "to start at 0, got 1", "offsets"),
    ([0, 4, 3, 5], "to be non-decreasing, got 3 after 4 at position 2", "<="),
    ([0, 2, 6], "to end at most at 5, got 6", "offsets"),
]


@pytest.mark.parametrize("offsets, message, asserted", BAD_OFFSETS)
def test_rejects_offsets_that_are_no_boundaries(offsets, message, asserted):
    args = make([5] + [0] * (len(offsets) - 2), 4, 3)[:4]
    args = (*args, torch.tensor(offsets, dtype=torch.int32))
    with pytest.raises(ValueError, match=f"expected expert_offsets {message}"):
        CPU.op(OP)(*args, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=f"device assert: .*{asserted}"):
        SIMT.op(OP)(*args, dtype=torch.float32)


@settings(max_examples=40)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    k=st.integers(0, 300),
    n=st.integers(0, 200),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_matches_reference(counts, k, n, dtype, seed):
    args = make(counts, k, n, seed=seed)
    check(CPU.op(OP)(*args, dtype=dtype), args, dtype)


@settings(max_examples=15)
@given(rows=st.integers(1, 90), cut=st.integers(0, 90), seed=st.integers(0, 2**31))
def test_rows_beside_change_no_bit(rows, cut, seed):
    a, a_scale, b, b_scale, offsets = make([rows], 260, 70, seed=seed)
    out = CPU.op(OP)(a, a_scale, b, b_scale, offsets, dtype=torch.float32)
    cut = min(cut, rows)
    part = CPU.op(OP)(a[:cut], a_scale[:cut], b, b_scale, offsets_of([cut]), dtype=torch.float32)
    assert torch.equal(part, out[:cut])


def test_threads_change_no_bit():
    args = make([1, 0, 150, 40], 300, 130)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(CPU.op(OP)(*args, dtype=torch.float32))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_thread_order_changes_no_bit(schedule):
    args = make([3, 70], 140, 24)
    expected = SIMT.op(OP)(*args, dtype=torch.float32)
    with schedule:
        assert torch.equal(SIMT.op(OP)(*args, dtype=torch.float32), expected)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from python_tests.ops.test_grouped_experts import route
from python_tests.ops.test_grouped_matmul_fp8 import lost_on
from python_tests.references import grouped_experts_fp8 as references
from python_tests.support.backends import BACKENDS, CPU, NO_GPU, SCHEDULES, SIMT

OP = "grouped_experts_fp8"
E4M3 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (slots of each expert, top-k, H, I); T = slots / top-k.
CASES = {
    "no-tokens": ([0, 0], 2, 5, 3),
    "one": ([1], 1, 1, 1),
    "edges": ([0, 1, 15, 17, 3], 2, 7, 33),
    "tiles": ([67, 0, 69], 2, 130, 136),
    "blocks": ([3, 0, 30, 35], 2, 256, 128),
    "half-blocks": ([9, 5], 2, 128, 192),
    "wgmma": ([0, 1, 15, 64, 128, 132], 2, 144, 208),  # tails along all sides of tiles of 128
    "top-3": ([5, 6, 7], 3, 8, 200),
    "no-hidden": ([2, 2], 2, 0, 4),
    "no-intermediate": ([2, 2], 2, 4, 0),
}


def blocks(n):
    return -(-n // 128)


def weight(shape, generator):
    """As a checkpoint's: numbers and scales such that their products are of size depth^-1/2."""
    e, n, k = shape
    q = (torch.randn(shape, generator=generator) * 100).clamp(-448, 448).to(E4M3)
    scale = 0.5 + torch.rand(e, blocks(n), blocks(k), generator=generator)
    return q, scale / 100 / max(k, 1) ** 0.5


def make(counts, top_k, hidden, intermediate, dtype, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens, experts = sum(counts) // top_k, len(counts)
    x = torch.randn(tokens, hidden, generator=g, dtype=torch.float64).to(dtype)
    halves = [weight((experts, intermediate, hidden), g) for _ in range(2)]
    gate_up, gate_up_scale = (torch.cat(t, 1) for t in zip(*halves, strict=True))
    down, down_scale = weight((experts, hidden, intermediate), g)
    weights = torch.rand(tokens, top_k, generator=g)
    args = (x, gate_up, gate_up_scale, down, down_scale, weights, *route(counts, top_k, seed))
    return tuple(t.to(device) for t in args)


def check(out, args, **options):
    for reference in (references.quantized, references.dequantized):
        value, bound = reference(*args, **options, lost=lost_on(out.device))
        info = torch.finfo(out.dtype)
        bound = bound + info.eps / 2 * (value.abs() + bound) + info.smallest_normal * info.eps
        error = (out.double().cpu() - value).abs()
        worst = (error / bound).max().item() if error.numel() else 0.0
        assert worst <= 1.0, f"error is {worst:.2f}x the bound of {reference.__name__}"
    assert out.shape == args[0].shape and out.dtype == args[0].dtype and out.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_matches_references(backend, case, dtype):
    args = make(*CASES[case], dtype, backend.device)
    check(backend.op(OP)(*args), args)


# Not on a GPU: what Hopper's tensor cores may lose, in the worst case, is more than scales of the
# same size differ by. There test_each_scale_goes_to_its_block of the plain product is exact, and
# ptx90 runs the same kernels with all bits.
@pytest.mark.parametrize("backend", NO_GPU)
def test_the_bound_notices_swapped_scales(backend):
    x, gate_up, gate_up_scale, *rest = make(*CASES["blocks"], torch.float32, backend.device)
    out = backend.op(OP)(x, gate_up, gate_up_scale.roll(1, dims=1), *rest)
    with pytest.raises(AssertionError, match="x the bound"):
        check(out, (x, gate_up, gate_up_scale, *rest))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activations(backend, activation):
    args = make([9, 0, 11], 2, 140, 150, torch.float32, backend.device)
    check(backend.op(OP)(*args, activation=activation), args, activation=activation)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropped", [1, 5, 20])
def test_dropped_slots_contribute_nothing(backend, dropped):
    args = list(make([9, 0, 11], 2, 140, 36, torch.bfloat16, backend.device))
    args[6] = args[6].clamp(max=20 - dropped)
    check(backend.op(OP)(*args), args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_misaligned_inputs(backend):
    args = make([5, 13], 2, 144, 24, torch.float32, backend.device)
    expected = backend.op(OP)(*args)
    strided = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in args[:6]]
    strided += [torch.stack([t, t], 1)[:, 0] for t in args[6:]]
    assert torch.equal(backend.op(OP)(*strided), expected)
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in args]
    check(backend.op(OP)(*shifted), args)  # may take another kernel: other bits


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_token(backend):
    x, *rest = make([6, 8], 2, 160, 8, torch.bfloat16, backend.device)
    x[3, 5] = float("nan")
    out = backend.op(OP)(x, *rest)
    assert out[3].isnan().all() and out.isnan().sum() == out.shape[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(backend):
    args = make([2, 0, 4], 2, 130, 4, torch.float32, backend.device)
    # torch's own test of schemas multiplies the inputs, which it cannot in e4m3.
    checks = ("test_autograd_registration", "test_faketensor")
    torch.library.opcheck(backend.op(OP), args, test_utils=checks)
    out = backend.op(OP)(args[0].requires_grad_(), *args[1:])
    with pytest.raises(NotImplementedError, match=f"mergeme::{OP}: e4m3 weights are for inference"):
        out.sum().backward()


BAD_INPUTS = [
    (0, lambda t: t.double(), TypeError, "expected x to be float16, bfloat16 or float32, got floa"),
    (1, lambda t: t.float(), TypeError, "expected gate_up to be float8_e4m3fn, got float32"),
    (2, lambda t: t.half(), TypeError, "expected gate_up_scale to be float32, got float16"),
    (3, lambda t: t.float(), TypeError, "expected down to be float8_e4m3fn, got float32"),
    (4, lambda t: t.double(), TypeError, "expected down_scale to be float32, got float64"),
    (5, lambda t: t.double(), TypeError, "expected topk_weights to be float32, got float64"),
    (0, lambda t: t[0], ValueError, r"expected x of shape \[T, H\], got \[130\]"),
    (1, lambda t: t[:, 1:], ValueError, r"gate_up of shape \[E, 2I, 130\] with E >= 1, got"),
    (2, lambda t: t[..., :1], ValueError, r"expected gate_up_scale of shape \[3, 4, 2\], got"),
    (2, lambda t: t[:, :3], ValueError, r"2 blocks of 128 rows for gate and as many for up, got 3"),
    (3, lambda t: t[..., :1], ValueError, r"expected down of shape \[3, 130, 190\], got"),
    (4, lambda t: t[:, :1], ValueError, r"expected down_scale of shape \[3, 2, 2\], got"),
    (6, lambda t: t[1:], ValueError, r"expected expert_offsets of shape \[4\], got \[3\]"),
]


@pytest.mark.parametrize("backend", [CPU, SIMT])
@pytest.mark.parametrize("place, spoil, error, message", BAD_INPUTS)
def test_rejects_bad_input(backend, place, spoil, error, message):
    args = list(make([2, 0, 4], 2, 130, 190, torch.float32))
    args[place] = spoil(args[place])
    with pytest.raises(error, match=f"mergeme::{OP}: .*{message}"):
        backend.op(OP)(*args)


@pytest.mark.parametrize("backend", [CPU, SIMT])
def test_rejects_unknown_activation(backend):
    args = make([2, 0, 4], 2, 8, 4, torch.float32)
    with pytest.raises(ValueError, match="expected activation to be silu, gelu or gelu_tanh, got"):
        backend.op(OP)(*args, activation="relu")


@settings(max_examples=15)
@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    hidden=st.integers(1, 280),
    intermediate=st.integers(1, 280),
    seed=st.integers(0, 2**31),
)
def test_any_shape_matches_references(counts, hidden, intermediate, seed):
    args = make(counts, 1, hidden, intermediate, torch.float32, seed=seed)
    check(CPU.op(OP)(*args), args)


def test_threads_and_rows_beside_change_no_bit():
    args = make([40, 0, 60], 2, 200, 150, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(CPU.op(OP)(*args))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_thread_order_changes_no_bit(schedule):
    args = make([3, 37], 2, 140, 36, torch.float32)
    expected = SIMT.op(OP)(*args)
    with schedule:
        assert torch.equal(SIMT.op(OP)(*args), expected)

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from python_tests.references.grouped_experts import grouped_experts as reference
from python_tests.support.backends import BACKENDS, CPU, NO_GPU, SCHEDULES, SIMT
from python_tests.support.tolerance import assert_as_good_as_eager

OP = "grouped_experts"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (slots of each expert, top-k, H, I); T = slots / top-k.
CASES = {
    "no-tokens": ([0, 0], 2, 5, 3),
    "one": ([1], 1, 1, 1),
    "edges": ([0, 1, 15, 17, 3], 2, 7, 33),
    "tiles": ([127, 0, 129], 2, 33, 17),
    "one-expert": ([20], 1, 16, 24),
    "aligned": ([3, 0, 130, 35], 2, 40, 72),
    "top-3": ([5, 6, 7], 3, 8, 8),
    "no-hidden": ([2, 2], 2, 0, 4),
    "no-intermediate": ([2, 2], 2, 4, 0),
}


def run(backend, *args, **options):
    """The op as its wrapper calls it: saves what the backward needs if one will follow."""
    save = torch.is_grad_enabled() and any(t.requires_grad for t in args[:4])
    return backend.op(OP)(*args, save=save, **options)[0]


def route(counts, top_k, seed=0):
    """Random choices that give each expert its count; the routing tensors of them."""
    g = torch.Generator().manual_seed(seed)
    experts = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    experts = experts[torch.randperm(len(experts), generator=g)]
    permutation = experts.argsort(stable=True)
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(experts))
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return offsets.int(), permutation.int(), inverse.int()


def make(counts, top_k, hidden, intermediate, dtype, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens, experts = sum(counts) // top_k, len(counts)
    x = torch.randn(tokens, hidden, generator=g, dtype=torch.float64)
    gate_up = torch.randn(experts, 2 * intermediate, hidden, generator=g, dtype=torch.float64)
    down = torch.randn(experts, hidden, intermediate, generator=g, dtype=torch.float64)
    weights = torch.rand(tokens, top_k, generator=g, dtype=torch.float64)
    floats = (x, gate_up / max(hidden, 1) ** 0.5, down / max(intermediate, 1) ** 0.5)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    routing = route(counts, top_k, seed)
    return tuple(t.to(device) for t in (*(f.to(dtype) for f in floats), weights.to(acc), *routing))


def eager(x, gate_up, down, topk_weights, offsets, permutation, inverse):
    out, top_k, bounds = torch.zeros_like(x), topk_weights.shape[1], offsets.tolist()
    for e in range(len(bounds) - 1):
        slots = permutation[bounds[e] : bounds[e + 1]].long()
        gate, up = (x[slots // top_k] @ gate_up[e].T).chunk(2, dim=-1)
        y = (torch.nn.functional.silu(gate) * up) @ down[e].T
        weights = topk_weights.reshape(-1)[slots, None].to(x.dtype)
        out.index_add_(0, slots // top_k, weights * y)
    return out


def check(out, args):
    assert out.shape == args[0].shape and out.dtype == args[0].dtype and out.is_contiguous()
    assert_as_good_as_eager(out, reference(*args), eager(*args))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(backend, case, dtype):
    args = make(*CASES[case], dtype, backend.device)
    check(run(backend, *args), args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dropped", [1, 5, 20])
def test_dropped_slots_contribute_nothing(backend, dtype, dropped):
    x, gate_up, down, weights, offsets, *rest = make([9, 0, 11], 2, 16, 8, dtype, backend.device)
    args = (x, gate_up, down, weights, offsets.clamp(max=20 - dropped), *rest)
    check(run(backend, *args), args)
    floats = [t.clone().requires_grad_() for t in args[:4]]
    out = run(backend, *floats, *args[4:])
    right = [t.double().clone().requires_grad_() for t in args[:4]]
    expected = eager(*right, *args[4:])
    grads = torch.autograd.grad(out, floats, torch.ones_like(out))
    exact = torch.autograd.grad(expected, right, torch.ones_like(expected))
    for ours, theirs in zip(grads, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=0.05, rtol=0.05)
    left_out = args[5][20 - dropped :].long()
    assert (grads[3].flatten()[left_out] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activations(backend, activation):
    args = make([9, 0, 11], 2, 16, 24, torch.float64, backend.device)
    out = run(backend, *args, activation=activation)
    torch.testing.assert_close(out, reference(*args, activation=activation), rtol=1e-12, atol=1e-12)
    args = (*(t.requires_grad_() for t in args[:4]), *args[4:])
    torch.autograd.gradcheck(
        lambda *a: run(backend, *a, activation=activation), args, fast_mode=backend.interpreted
    )


def misaligned(t):
    """The same values, starting one element after an aligned address."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_and_misaligned_inputs(backend, dtype):
    args = make([5, 13], 2, 16, 24, dtype, backend.device)
    expected = run(backend, *args)
    strided = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in args[:4]]
    strided += [torch.stack([t, t], 1)[:, 0] for t in args[4:]]
    assert not any(t.is_contiguous() for t in strided)
    assert torch.equal(run(backend, *strided), expected)
    moved = (*(misaligned(t) for t in args[:4]), *args[4:])  # may take another kernel: other bits
    check(run(backend, *moved), moved)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_gates(backend):
    x, gate_up, down, *rest = make([6, 8], 2, 8, 16, torch.float32, backend.device)
    args = (x * 60, gate_up * 60, down, *rest)  # silu saturates on both sides
    check(run(backend, *args), args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_its_token(backend, dtype):
    x, *rest = make([6, 8], 2, 16, 8, dtype, backend.device)
    x[3, 5] = float("nan")
    out = run(backend, x, *rest)
    assert out[3].isnan().all() and out.isnan().sum() == out.shape[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration_and_gradient(backend):
    args = make([2, 0, 4], 2, 3, 4, torch.float64, backend.device)
    torch.library.opcheck(backend.op(OP), args)
    args = (*(t.requires_grad_() for t in args[:4]), *args[4:])
    torch.library.opcheck(backend.op(OP), args)
    torch.library.opcheck(backend.op(OP), args, {"save": True})
    torch.autograd.gradcheck(partial(run, backend), args, fast_mode=backend.interpreted)
    torch.autograd.gradcheck(
        lambda *a: backend.op(OP)(*a)[0], args, fast_mode=backend.interpreted
    )  # nothing saved
    first = torch.autograd.grad(run(backend, *args).sum(), args[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(first[0].sum(), args[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_as_good_as_eager(backend, dtype):
    def gradients(function, args):
        floats = [t.detach().clone().requires_grad_() for t in args[:4]]
        out = function(*floats, *args[4:])
        seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        return torch.autograd.grad(out, floats, seed.to(dtype).to(out))

    args = make([9, 0, 16, 7], 2, 24, 16, dtype, backend.device)
    exact = gradients(eager, [t.double() for t in args[:4]] + list(args[4:]))
    ours, theirs = gradients(partial(run, backend), args), gradients(eager, args)
    for mine, right, other in zip(ours, exact, theirs, strict=True):
        assert mine.dtype == other.dtype
        assert_as_good_as_eager(mine, right.cpu(), other)


@pytest.mark.parametrize("needed", range(4))
def test_gradient_of_one_argument(needed):
    args = make([2, 0, 4], 2, 3, 4, torch.float64)
    args[needed].requires_grad_()
    (one,) = torch.autograd.grad(run(CPU, *args).sum(), args[needed])
    (right,) = torch.autograd.grad(eager(*args).sum(), args[needed])
    torch.testing.assert_close(one, right)


NAMES = ["x", "gate_up", "down", "topk_weights", "expert_offsets", "permutation", "inverse"]
BAD_INPUTS = [
    ("x", lambda t: t.int(), TypeError, "expected x to be float16.*got int32"),
    ("gate_up", lambda t: t.half(), TypeError, "expected gate_up to be float32, got float16"),
    ("down", lambda t: t.double(), TypeError, "expected down to be float32, got float64"),
    ("topk_weights", lambda t: t.double(), TypeError, "topk_weights to be float32, got float64"),
    ("expert_offsets", lambda t: t.long(), TypeError, "expert_offsets to be int32, got int64"),
    ("permutation", lambda t: t.long(), TypeError, "expected permutation to be int32, got int64"),
    ("inverse", lambda t: t.long(), TypeError, "expected inverse to be int32, got int64"),
    ("x", lambda t: t[0], ValueError, r"expected x of shape \[T, H\], got \[4\]"),
    ("gate_up", lambda t: t[0], ValueError, r"gate_up of shape \[E, 2I, H\], got \[6, 4\]"),
    ("down", lambda t: t[0], ValueError, r"expected down of shape \[E, H, I\], got \[4, 3\]"),
    ("topk_weights", lambda t: t[0], ValueError, r"topk_weights of shape \[T, K\], got \[2\]"),
    ("gate_up", lambda t: t[:, :5], ValueError, r"\[E, 2I, 4\] with E >= 1, got \[2, 5, 4\]"),
    ("gate_up", lambda t: t[:0], ValueError, r"\[E, 2I, 4\] with E >= 1, got \[0, 6, 4\]"),
    ("x", lambda t: t[:, :3], ValueError, r"\[E, 2I, 3\] with E >= 1, got \[2, 6, 4\]"),
    ("down", lambda t: t[:1], ValueError, r"down of shape \[2, 4, 3\], got \[1, 4, 3\]"),
    ("x", lambda t: t[:2], ValueError, r"topk_weights of shape \[2, 2\], got \[3, 2\]"),
    ("expert_offsets", lambda t: t[1:], ValueError, r"expert_offsets of shape \[3\], got \[2\]"),
    ("permutation", lambda t: t[1:], ValueError, r"permutation of shape \[6\], got \[5\]"),
    ("inverse", lambda t: t[1:], ValueError, r"inverse of shape \[6\], got \[5\]"),
]


@pytest.mark.parametrize("backend", [CPU, SIMT])
@pytest.mark.parametrize("name, spoil, error, message", BAD_INPUTS)
def test_rejects_bad_input(backend, name, spoil, error, message):
    args = dict(zip(NAMES, make([2, 4], 2, 4, 3, torch.float32), strict=True))
    args[name] = spoil(args[name])
    with pytest.raises(error, match=f"mergeme::{OP}: .*{message}"):
        run(backend, *args.values())


BAD_VALUES = [
    ("expert_offsets", [0, 2, 7], ValueError, "to end at most at 6, got 7", "offsets"),
    ("expert_offsets", [0, 7, 6], ValueError, "got 6 after 7 at position 2", "<="),
    (
        "permutation",
        [0, 1, 2, 6, 4, 5],
        IndexError,
        r"in \[0, 6\), got 6 at position 3",
        "permutation",
    ),
    ("inverse", [0, -1, 2, 3, 4, 5], IndexError, r"in \[0, 6\), got -1 at position 1", "inverse"),
]


@pytest.mark.parametrize("backend", NO_GPU)
@pytest.mark.parametrize("name, values, error, message, asserted", BAD_VALUES)
def test_rejects_routing_out_of_range(backend, name, values, error, message, asserted):
    args = dict(zip(NAMES, make([2, 4], 2, 4, 3, torch.float32), strict=True))
    args[name] = torch.tensor(values, dtype=torch.int32)
    expected = f"expected {name} .*{message}|device assert: .*{asserted}"
    with pytest.raises(error if backend is CPU else RuntimeError, match=expected):
        run(backend, *args.values())


@settings(max_examples=30)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    top_k=st.integers(1, 3),
    hidden=st.integers(1, 40),
    intermediate=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape_matches_reference(counts, top_k, hidden, intermediate, dtype, seed):
    counts[0] += -sum(counts) % top_k
    args = make(counts, top_k, hidden, intermediate, dtype, seed=seed)
    check(run(CPU, *args), args)


@pytest.mark.parametrize("backend", [CPU, SIMT])
@settings(max_examples=10)
@given(counts=st.lists(st.integers(0, 9), min_size=2, max_size=4), seed=st.integers(0, 2**31))
def test_doubled_weights_double_the_result(backend, counts, seed):
    x, gate_up, down, weights, *routing = make(counts, 1, 8, 5, torch.float32, seed=seed)
    once = run(backend, x, gate_up, down, weights, *routing)
    twice = run(backend, x, gate_up, down, 2 * weights, *routing)
    assert torch.equal(twice, 2 * once)  # a power of two commutes with every rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype):
    args = make([1, 0, 150, 49], 2, 130, 70, dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(run(CPU, *args))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thread_order_changes_no_bit(schedule, dtype):
    args = make([3, 71], 2, 40, 24, dtype)
    expected = run(SIMT, *args)
    with schedule:
        assert torch.equal(run(SIMT, *args), expected)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [CPU, SIMT])
def test_compiles(backend):
    def step(*args):
        return run(backend, *args).relu().sum()

    args = make([2, 0, 4], 2, 8, 6, torch.float32)
    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        floats = [t.clone().requires_grad_() for t in args[:4]]
        out = function(*floats, *args[4:])
        results.append((out.detach(), *torch.autograd.grad(out, floats)))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_joins_the_current_stream():
    args = make([200, 312], 2, 256, 256, torch.bfloat16, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = torch.ops.mergeme.grouped_experts(*args)
    torch.cuda.current_stream().wait_stream(stream)
    check(out, args)

import os
import subprocess
import sys
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from python_tests.references.router_statistics import router_statistics as reference
from python_tests.support.backends import BACKENDS, CPU, SCHEDULES, SIMT, backends_with_errors
from python_tests.support.tolerance import assert_as_good_as_eager, assert_within_rounding

OP = "router_statistics"
BACKWARD = "router_statistics_backward"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (T, E, K): no token, one of one, no ids, odd sizes, around chunks of 16 tokens, more experts than
# a warp's shared sums hold.
CASES = [(0, 4, 2), (1, 1, 1), (7, 5, 0), (5, 33, 3), (16, 8, 2), (50, 65, 4), (2, 4100, 1)]


def make(tokens, num_experts, top_k, dtype, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(tokens, num_experts, generator=g, dtype=torch.float64)
    ids = torch.randint(num_experts, (tokens, top_k), generator=g, dtype=torch.int32)
    mask = torch.rand(tokens, generator=g) < 0.7
    return logits.to(dtype).to(device), ids.to(device), mask.to(device)


def assert_correct(out, logits, ids, mask):
    counts, sums, squares = out
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert counts.dtype == torch.int32 and sums.dtype == squares.dtype == wide
    expected = reference(logits, ids, mask)
    assert torch.equal(counts.cpu().long(), expected[0])
    # An exponential (4) of a rounded difference (its size), over a sum of E such terms (E / 32 + 5
    # additions), a quotient and a product (2); added up over tokens.
    tokens, num_experts = logits.shape
    largest = logits.double().abs().max().item() if logits.numel() else 0
    terms = 2 * (4 + 2 * largest) + num_experts / 32 + 7 + tokens
    assert_within_rounding(sums, expected[1], expected[1], terms=terms)
    # The logarithm turns the sum's relative error into an absolute one, at most as large as the lse
    # plus one; squared and added up.
    magnitude = expected[2] + tokens
    assert_within_rounding(squares, expected[2], magnitude, terms=2 * terms + tokens + 6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, num_experts, top_k", CASES)
def test_matches_reference(backend, dtype, tokens, num_experts, top_k):
    logits, ids, mask = make(tokens, num_experts, top_k, dtype, backend.device)
    for m in (None, mask, torch.zeros_like(mask)):
        assert_correct(backend.op(OP)(logits, ids, m), logits, ids, m)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens_on_the_cpu(dtype):
    """Chunks longer than 16 tokens."""
    args = make(17_001, 8, 2, dtype)
    assert_correct(CPU.op(OP)(*args), *args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_far_apart(backend):
    logits = torch.tensor([[500.0, -500.0, 499.0], [-900.0, -901.0, -1e30]], device=backend.device)
    ids = torch.zeros(2, 1, dtype=torch.int32, device=backend.device)
    counts, sums, squares = (t.cpu() for t in backend.op(OP)(logits, ids))
    assert counts.tolist() == [2, 0, 0]
    torch.testing.assert_close(sums, logits.double().softmax(1).sum(0).float().cpu())
    expected = logits.double().logsumexp(1).square().sum()
    torch.testing.assert_close(squares, expected.float().cpu())


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_that_are_none(backend):
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[0, nan, 1], [-inf] * 3, [1, -inf, 2]], device=backend.device)
    ids = torch.zeros(3, 1, dtype=torch.int32, device=backend.device)
    for t, of in enumerate((lambda x: x.isnan().all(), torch.isinf, torch.isfinite)):
        leaf = logits[t : t + 1].clone().requires_grad_()
        counts, sums, squares = backend.op(OP)(leaf, ids[:1])
        assert counts[0] == 1 and of(squares)
        assert sums.isnan().all() == (t == 0)
        (grad,) = torch.autograd.grad(sums[0], leaf)
        assert grad.isfinite().all() == (t > 0)
    mask = torch.tensor([False, False, True], device=backend.device)
    assert backend.op(OP)(logits, ids, mask)[1].isfinite().all()
    leaf = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(backend.op(OP)(leaf, ids, mask)[2], leaf)
    assert (grad[:2] == 0).all() and grad[2].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_misaligned_inputs(backend):
    logits, ids, mask = make(9, 7, 2, torch.float32, backend.device)
    expected = backend.op(OP)(logits, ids, mask)
    shifted = torch.cat([logits.flatten()[:1], logits.flatten()])[1:].view(9, 7)
    for z in (logits.t().contiguous().t(), shifted):
        out = backend.op(OP)(z, ids.t().contiguous().t(), torch.stack([mask, mask], 1)[:, 0])
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
def test_registration_and_gradient(backend, masked):
    logits, ids, mask = make(5, 7, 2, torch.float64, backend.device)
    args = (logits, ids, mask if masked else None)
    torch.library.opcheck(backend.op(OP), args)
    grads = (torch.rand_like(logits[0]), torch.rand_like(logits[0, 0]))
    torch.library.opcheck(backend.op(BACKWARD), (*grads, logits, args[2]))
    leaf = logits.requires_grad_()
    torch.autograd.gradcheck(
        lambda z: backend.op(OP)(z, *args[1:])[1:], (leaf,), fast_mode=backend.interpreted
    )
    torch.autograd.gradcheck(
        lambda z: backend.op(OP)(z, *args[1:])[2], (leaf,), fast_mode=backend.interpreted
    )
    assert not backend.op(OP)(leaf, *args[1:])[0].requires_grad
    with pytest.raises(NotImplementedError, match=f"mergeme::{BACKWARD}: second derivatives"):
        backend.op(BACKWARD)(*grads, leaf, None).sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, num_experts", [(6, 70), (3, 300), (0, 4)])
def test_gradient_matches_autograd(backend, dtype, tokens, num_experts):
    logits, ids, mask = make(tokens, num_experts, 1, dtype, backend.device)
    factors = torch.randn(num_experts, dtype=torch.float64).to(backend.device)

    def gradient(z, statistics):
        leaf = z.clone().requires_grad_()
        sums, squares = statistics(leaf)
        loss = (sums * factors.to(sums.dtype)).sum() + 0.3 * squares
        return torch.autograd.grad(loss, leaf)[0]

    def eager(z):
        wide = z if z.dtype == torch.float64 else z.float()
        squares = (wide.logsumexp(1) ** 2 * mask).sum()
        return (wide.softmax(1) * mask[:, None]).sum(0), squares

    grad = gradient(logits, lambda z: backend.op(OP)(z, ids, mask)[1:])
    assert grad.dtype == dtype and not grad[~mask].any()
    exact = gradient(logits.double(), eager).cpu()
    if dtype == torch.float64:  # as exact as ours
        torch.testing.assert_close(grad.cpu(), exact, rtol=1e-12, atol=1e-14)
    else:
        assert_as_good_as_eager(grad, exact, gradient(logits, eager))


BAD_INPUTS = [
    ("logits", lambda t: t.int(), TypeError, "expected logits to be float16.*got int32"),
    ("logits", lambda t: t[0], ValueError, r"expected logits of shape \[T, E\], got \[4\]"),
    ("logits", lambda t: t[:, :0], ValueError, r"expected E in \[1, 2\^31 - 2\], got 0"),
    ("topk_ids", lambda t: t.long(), TypeError, "expected topk_ids to be int32, got int64"),
    ("topk_ids", lambda t: t[0], ValueError, r"expected topk_ids of shape \[T, K\], got \[2\]"),
    ("topk_ids", lambda t: t[1:], ValueError, r"expected topk_ids of shape \[3, 2\], got \[2, 2\]"),
    (
        "topk_ids",
        lambda t: t[:, :1].expand(3, 2**30),
        ValueError,
        r"expected topk_ids of fewer than 2\^31 slots .*, got 3221225472",
    ),
    ("mask", lambda t: t.float(), TypeError, "expected mask to be Bool, got float32"),
    ("mask", lambda t: t[1:], ValueError, r"expected mask of shape \[3\], got \[2\]"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, spoil, error, message", BAD_INPUTS)
def test_rejects_bad_input(backend, name, spoil, error, message):
    names = ("logits", "topk_ids", "mask")
    args = dict(zip(names, make(3, 4, 2, torch.float32, backend.device), strict=True))
    args[name] = spoil(args[name])
    with pytest.raises(error, match=f"mergeme::{OP}: {message}"):
        backend.op(OP)(*args.values())


BAD_BACKWARD_INPUTS = [
    ("grad_sums", lambda t: t.double(), TypeError, "expected grad_sums to be float32, got float64"),
    ("grad_sums", lambda t: t[1:], ValueError, r"expected grad_sums of shape \[4\], got \[3\]"),
    ("grad_squares", lambda t: t.half(), TypeError, "expected grad_squares to be float32, got fl"),
    ("grad_squares", lambda t: t[None], ValueError, r"expected grad_squares of shape \[\], got \["),
    ("logits", lambda t: t.long(), TypeError, "expected logits to be float16.*got int64"),
    ("mask", lambda t: t[1:], ValueError, r"expected mask of shape \[3\], got \[2\]"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, spoil, error, message", BAD_BACKWARD_INPUTS)
def test_backward_rejects_bad_input(backend, name, spoil, error, message):
    logits, _, mask = make(3, 4, 2, torch.float32, backend.device)
    args = {"grad_sums": logits[0], "grad_squares": logits[0, 0], "logits": logits, "mask": mask}
    args[name] = spoil(args[name])
    with pytest.raises(error, match=f"mergeme::{BACKWARD}: {message}"):
        backend.op(BACKWARD)(**args)


@pytest.mark.parametrize("backend, error", backends_with_errors(IndexError))
@pytest.mark.parametrize("bad", [-1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_rejects_id_out_of_range(backend, error, bad, masked):
    logits, ids, mask = make(20, 4, 2, torch.float32)
    ids[18, 1], mask[18] = bad, False
    message = rf"expected topk_ids in \[0, 4\), got {bad} at \[18, 1\]|device assert: id >= 0"
    with pytest.raises(error, match=message):
        backend.op(OP)(logits, ids, mask if masked else None)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 60),
    num_experts=st.integers(1, 80),
    dtype=st.sampled_from(DTYPES),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_backends_give_the_same_bits(tokens, num_experts, dtype, masked, seed):
    logits, ids, mask = make(tokens, num_experts, 2, dtype, seed=seed)
    mask = mask if masked else None
    results = []
    for backend in (CPU, SIMT):
        out = backend.op(OP)(logits, ids, mask)
        grad = backend.op(BACKWARD)(out[1], out[2], logits, mask)
        results.append((*out, grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_thread_order_changes_no_bit(schedule):
    args = make(40, 50, 3, torch.float32)
    expected = CPU.op(OP)(*args)
    with schedule:
        out = SIMT.op(OP)(*args)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


def test_thread_count_changes_no_bit():
    args = make(9001, 24, 2, torch.bfloat16)
    expected = CPU.op(OP)(*args)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = CPU.op(OP)(*args)
            assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    finally:
        torch.set_num_threads(threads)


def digest():
    """Every bit of the CPU's results over dtypes, as one line."""
    digests = []
    for dtype in DTYPES:
        logits, ids, mask = make(40, 77, 3, dtype)
        out = CPU.op(OP)(logits, ids, mask)
        grad = CPU.op(BACKWARD)(out[1], out[2], logits, mask)
        digests += [zlib.crc32(t.reshape(-1).view(torch.uint8).numpy()) for t in (*out, grad)]
    return str(digests)


@pytest.mark.slow
def test_instruction_set_changes_no_bit():
    code = f"from {__name__} import digest; print(digest())"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "MERGEME_CPU_ISA": isa},
            stdout=subprocess.PIPE,
            text=True,
        )
        for isa in ("portable", "avx2")
    ]
    outputs = [run.communicate()[0].strip() for run in runs]
    assert outputs == [digest(), digest()]  # ours with whatever this process runs


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles(backend):
    logits, ids, mask = make(20, 9, 3, torch.float32, backend.device)

    def statistics(logits):
        return backend.op(OP)(logits, ids, mask)

    results = []
    for function in (statistics, torch.compile(statistics, fullgraph=True)):
        leaf = logits.clone().requires_grad_()
        counts, sums, squares = function(leaf)
        results.append((counts, sums, squares, *torch.autograd.grad(sums[0] + squares, leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

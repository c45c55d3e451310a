import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from python_tests.references.sort_by_expert import sort_by_expert as reference
from python_tests.support.backends import BACKENDS, CPU, CUDA, SCHEDULES, SIMT, backends_with_errors

OP = "sort_by_expert"
# (T, K, E): empty, one slot, one expert, around a chunk of 512 slots, more experts than slots, more
# experts than a warp's shared counters hold, the most that one block sorts and a bit more.
CASES = [
    (0, 2, 4),
    (1, 1, 1),
    (7, 0, 3),
    (50, 3, 1),
    (33, 2, 8),
    (171, 3, 64),
    (256, 2, 8),
    (257, 4, 17),
    (400, 5, 1027),
    (30, 1, 4100),
    (4200, 1, 4100),
    (1024, 4, 640),
    (1025, 4, 17),
    (40, 3, 641),
]


def make(tokens, top_k, num_experts, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(num_experts, (tokens, top_k), generator=g, dtype=torch.int32)
    return ids.to(device)


def assert_equal(out, expected):
    for a, b in zip(out, expected, strict=True):
        assert a.dtype == torch.int32 and torch.equal(a.cpu(), b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens, top_k, num_experts", CASES)
def test_matches_reference(backend, tokens, top_k, num_experts):
    ids = make(tokens, top_k, num_experts, backend.device)
    assert_equal(backend.op(OP)(ids, num_experts), reference(ids, num_experts))


def make_priority(ids, dtype, seed=1):
    """Few distinct values of both signs, so that many are equal, and a NaN and infinities."""
    g = torch.Generator().manual_seed(seed)
    special = torch.tensor([torch.nan, -torch.inf, torch.inf, -0.0], dtype=dtype)
    values = torch.cat([torch.arange(-6, 7).to(dtype) / 4, special])
    return values[torch.randint(len(values), ids.shape, generator=g)].to(ids.device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("priority", [None, torch.float32, torch.float64])
@pytest.mark.parametrize("capacity", [None, 0, 1, 11, 10_000])
@pytest.mark.parametrize("tokens, top_k, num_experts", [*CASES[:7], (40, 4, 5)])
def test_dropped_slots(backend, tokens, top_k, num_experts, capacity, priority):
    """Sentinels and capacity together."""
    ids = make(tokens, top_k, num_experts + 1, backend.device)
    assert ids.numel() < 50 or (ids == num_experts).any()
    keys = None
    if priority and capacity is not None:
        keys = make_priority(ids, priority)
    out = backend.op(OP)(ids, num_experts, sentinel=True, capacity=capacity, priority=keys)
    assert_equal(out, reference(ids, num_experts, capacity, keys))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by_priority", [False, True])
def test_capacity_of_one_crowded_expert(backend, by_priority):
    ids = torch.full((300, 2), 1, dtype=torch.int32, device=backend.device)
    keys = make_priority(ids, torch.float32) if by_priority else None
    for capacity in (64, 599, 600):
        out = backend.op(OP)(ids, 3, capacity=capacity, priority=keys)
        assert_equal(out, reference(ids, 3, capacity, keys))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_priority(backend):
    ids = make(30, 3, 4, backend.device)
    keys = make_priority(ids, torch.float32)
    out = backend.op(OP)(ids, 4, capacity=5, priority=keys.t().contiguous().t())
    assert_equal(out, reference(ids, 4, 5, keys))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("expert", [0, 5, 8])
def test_all_tokens_to_one_expert(backend, expert):
    ids = torch.full((300, 2), expert, dtype=torch.int32, device=backend.device)
    assert_equal(backend.op(OP)(ids, 9), reference(ids, 9))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_misaligned_inputs(backend):
    ids = make(100, 3, 8, backend.device)
    expected = reference(ids, 8)
    assert_equal(backend.op(OP)(ids.t().contiguous().t(), 8), expected)
    assert_equal(
        backend.op(OP)(torch.cat([ids[:1, :1].flatten(), ids.flatten()])[1:].view(100, 3), 8),
        expected,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(backend):
    torch.library.opcheck(backend.op(OP), (make(17, 2, 8, backend.device), 8))
    args = (make(17, 2, 9, backend.device), 8, torch.rand(17, 2, device=backend.device))
    options = {"sentinel": True, "capacity": 3}
    torch.library.opcheck(backend.op(OP), args, options)
    out = backend.op(OP)(*args[:2], args[2].requires_grad_(), **options)
    assert not any(t.requires_grad for t in out)


BAD_INPUTS = [
    (lambda t: (t.long(), 8), TypeError, "expected topk_ids to be int32, got int64"),
    (lambda t: (t[0], 8), ValueError, r"expected topk_ids of shape \[T, K\], got \[2\]"),
    (lambda t: (t, 0), ValueError, r"expected num_experts in \[1, 2\^31 - 2\], got 0"),
    (lambda t: (t, 2**31), ValueError, r"expected num_experts in .*, got 2147483648"),
    (
        lambda t: (t[:1, :1].expand(2**16, 2**16), 8),
        ValueError,
        r"expected topk_ids of fewer than 2\^31 slots .*, got 4294967296",
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spoil, error, message", BAD_INPUTS)
def test_rejects_bad_input(backend, spoil, error, message):
    with pytest.raises(error, match=f"mergeme::{OP}: {message}"):
        backend.op(OP)(*spoil(make(5, 2, 8, backend.device)))


BAD_OPTIONS = [
    (lambda t: {"capacity": -1}, ValueError, r"expected capacity in \[0, 2\^31 - 1\] .*, got -1"),
    (lambda t: {"capacity": 2**31}, ValueError, "expected capacity in .*, got 2147483648"),
    (
        lambda t: {"priority": t.float()},
        ValueError,
        "expected priority to be None without a capacity, got a tensor",
    ),
    (
        lambda t: {"capacity": 2, "priority": t.half()},
        TypeError,
        "expected priority to be float32 or float64, got float16",
    ),
    (
        lambda t: {"capacity": 2, "priority": t[1:].float()},
        ValueError,
        r"expected priority of shape \[5, 2\], got \[4, 2\]",
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spoil, error, message", BAD_OPTIONS)
def test_rejects_bad_options(backend, spoil, error, message):
    ids = make(5, 2, 8, backend.device)
    with pytest.raises(error, match=f"mergeme::{OP}: {message}"):
        backend.op(OP)(ids, 8, **spoil(ids))


@pytest.mark.parametrize("backend, error", backends_with_errors(IndexError))
@pytest.mark.parametrize("bad", [-1, 9])
def test_rejects_id_beyond_the_sentinel(backend, error, bad):
    ids = make(40, 2, 8)
    ids[18, 1] = bad
    message = rf"expected topk_ids in \[0, 8\], got {bad} at \[18, 1\]|device assert: expert >= 0"
    with pytest.raises(error, match=message):
        backend.op(OP)(ids, 8, sentinel=True)


@pytest.mark.parametrize("backend, error", backends_with_errors(IndexError))
@pytest.mark.parametrize("num_experts", [8, 5000])
@pytest.mark.parametrize("bad", [-1, 5000])
def test_rejects_id_out_of_range(backend, error, num_experts, bad):
    ids = make(40, 2, 8)
    ids[18, 1] = bad
    message = rf"expected topk_ids in \[0, {num_experts}\), got {bad} at \[18, 1\]"
    thread = 37 if num_experts == 8 else 5  # slot 37: in a block of all slots, in its warp
    with pytest.raises(error, match=rf"{message}|device assert: expert >= 0 .*thread {thread}\b"):
        backend.op(OP)(ids, num_experts)


def test_reports_the_first_bad_id_of_all_threads():
    ids = make(40_000, 2, 8)
    ids[300, 0], ids[39_000, 1] = 9, -4
    with pytest.raises(IndexError, match=r"got 9 at \[300, 0\]"):
        CPU.op(OP)(ids, 8)


@pytest.mark.parametrize("backend", [CPU, SIMT])
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 700),
    top_k=st.integers(1, 3),
    num_experts=st.integers(1, 80),
    seed=st.integers(0, 2**31),
)
def test_is_a_stable_sort(backend, tokens, top_k, num_experts, seed):
    ids = make(tokens, top_k, num_experts, seed=seed)
    offsets, permutation, inverse = (t.long() for t in backend.op(OP)(ids, num_experts))
    flat = ids.flatten().long()
    assert torch.equal(permutation, flat.argsort(stable=True))
    assert torch.equal(permutation[inverse], torch.arange(len(flat)))
    assert torch.equal(offsets.diff(), flat.bincount(minlength=num_experts))
    assert offsets[0] == 0 and offsets[-1] == len(flat)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_thread_order_changes_no_bit(schedule):
    ids = make(420, 3, 40)
    keys = make_priority(ids, torch.float32)
    with schedule:
        assert_equal(SIMT.op(OP)(ids, 40), reference(ids, 40))
        out = SIMT.op(OP)(ids, 40, capacity=20, priority=keys)
        assert_equal(out, reference(ids, 40, 20, keys))


def test_thread_count_changes_no_bit():
    ids = make(30_000, 2, 60)
    keys = make_priority(ids, torch.float32)
    expected, capped = CPU.op(OP)(ids, 60), CPU.op(OP)(ids, 60, capacity=700, priority=keys)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_equal(CPU.op(OP)(ids, 60), expected)
            assert_equal(CPU.op(OP)(ids, 60, capacity=700, priority=keys), capped)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles(backend):
    ids = make(60, 2, 8, backend.device)
    compiled = torch.compile(lambda ids: backend.op(OP)(ids, 8), fullgraph=True)
    assert_equal(compiled(ids), reference(ids, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_runs_on_a_side_stream():
    ids = make(100_003, 8, 256, "cuda")
    expected = CPU.op(OP)(ids.cpu(), 256)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = CUDA.op(OP)(ids, 256)
    stream.synchronize()
    assert_equal(out, expected)

"""What the shim reports: each kind of broken kernel or launch, with the place."""

import numpy as np
import pytest

from mergeme_ext import _simt
from python_tests.simt.support import run

SOURCE = r"\(csrc/simt/host/test_kernels\.cuh:\d+\)"
# Kernel, arguments of run(), message. In each the block or warp is otherwise in order.
REPORTS = [
    pytest.param(
        "bad_assert",
        {"n": 2 * 64 + 37, "grid": (2, 2, 1), "block": (8, 4, 2)},
        r"device assert: global_rank\(\) != p\.n at csrc/simt/host/test_kernels\.cuh:\d+ "
        r"\[block 0,1,0 thread 5,0,1\]",
        id="assert",
    ),
    pytest.param(
        "bad_leave",
        {"n": 3, "block": (70, 1, 1)},
        r"a thread left the block before __syncthreads\(\): thread 3,0,0 has left, while this one "
        rf"waits at __syncthreads\(\) {SOURCE} \[block 0,0,0 thread 0,0,0\]",
        id="left-before-barrier",
    ),
    pytest.param(
        "bad_two_barriers",
        {"n": 5},
        rf"divergent barrier: this thread waits at __syncthreads\(\) {SOURCE}, but thread 0,0,0 "
        rf"waits at __syncthreads\(\) {SOURCE} \[block 0,0,0 thread 5,0,0\]",
        id="two-barriers",
    ),
    pytest.param(
        "bad_barrier_and_warp",
        {},
        rf"deadlock \(.*\): this thread waits at __syncwarp\(\) {SOURCE} with mask 0xffffffff, "
        rf"but thread 0,0,0 waits at __syncthreads\(\) {SOURCE} \[block 0,0,0 thread 16,0,0\]",
        id="barrier-and-warp-call",
    ),
    pytest.param(
        "bad_mask",
        {"n": 0},
        r"a warp mask lacks the calling lane: .*mask 0xfffffffe.*thread 0,0,0\]",
        id="mask-without-caller",
    ),
    pytest.param(
        "bad_mask",
        {"n": 1},
        r"a warp mask names lanes that have left \(0x00000020\): .*mask 0xffffffff.*thread 6,0,0\]",
        id="mask-of-lane-that-left",
    ),
    pytest.param(
        "bad_mask",
        {"n": 2, "block": (40, 1, 1)},
        r"a warp mask names lanes that the block does not have \(0xffffff00\).*thread 32,0,0\]",
        id="mask-of-missing-lane",
    ),
    pytest.param(
        "bad_mask",
        {"n": 3},
        r"deadlock \(.*\): this thread waits at __syncwarp\(\) .* with mask 0xffffffff, but "
        r"thread 16,0,0 has left \[block 0,0,0 thread 0,0,0\]",
        id="two-masks",
    ),
    pytest.param(
        "bad_mask",
        {"n": 4},
        r"divergent warp call: this thread waits .* with mask 0xffff8000, but thread 15,0,0 waits "
        r".* with mask 0xffffffff \[block 0,0,0 thread 31,0,0\]",
        id="two-masks-that-overlap",
    ),
    pytest.param(
        "bad_two_calls",
        {},
        r"divergent warp call: this thread waits at __any_sync\(\).*but thread 0,0,0 waits at "
        r"__ballot_sync\(\).*thread 31,0,0\]",
        id="two-warp-calls",
    ),
    pytest.param(
        "bad_shared_store",
        {"n": 100, "shared": 100},
        r"a store 0 bytes past the end of 100 bytes of shared memory \[block 0,0,0\]",
        id="store-past-shared-memory",
        marks=pytest.mark.skipif(
            _simt.sanitizer == "address", reason="AddressSanitizer ends the process here"
        ),
    ),
]


@pytest.mark.parametrize("kernel, arguments, message", REPORTS)
def test_reports(kernel, arguments, message):
    with pytest.raises(RuntimeError, match=f"^{kernel}: {message}"):
        run(kernel, **arguments)


MIB = 1024 * 1024
LAUNCHES = [
    ({"block": (1025, 1, 1)}, "expected 1 to 1024 threads per block .*, got 1025,1,1"),
    ({"block": (32, 33, 1)}, "expected 1 to 1024 threads per block .*, got 32,33,1"),
    ({"block": (2**16, 2**16, 1)}, "expected 1 to 1024 threads per block .*, got 65536,65536,1"),
    ({"block": (1, 1, 65)}, "at most 64 in z, got 1,1,65"),
    ({"block": (32, 0, 1)}, "expected 1 to 1024 threads per block .*, got 32,0,1"),
    ({"grid": (0, 1, 1)}, "expected at least one block, got a grid of 0,1,1"),
    ({"grid": (2**31, 1, 1)}, "expected a grid of at most 2147483647,65535,65535, got 2147483648"),
    ({"grid": (1, 65536, 1)}, "expected a grid of at most 2147483647,65535,65535, got 1,65536,1"),
    ({"grid": (1, 1, 65536)}, "expected a grid of at most 2147483647,65535,65535, got 1,1,65536"),
    ({"shared": 227 * 1024 + 1}, "expected at most 232448 bytes of shared memory, got 232449"),
]


@pytest.mark.parametrize("arguments, message", LAUNCHES)
def test_rejects_what_no_gpu_could_launch(arguments, message):
    with pytest.raises(RuntimeError, match=f"place: invalid launch configuration: .*{message}"):
        run("place", **arguments)


def test_largest_launch_that_a_gpu_allows():
    run("fma", (np.zeros(3),), ((2,), np.float64), block=(1024, 1, 1), shared=227 * 1024)


@pytest.mark.parametrize("kernel, arguments, message", REPORTS)
def test_the_next_launch_is_sound(kernel, arguments, message):
    """A failure abandons threads in the middle of calls; nothing of them is left."""
    with pytest.raises(RuntimeError):
        run(kernel, **arguments)
    v = np.ones(70, np.int32)
    out = run("block_votes", (v,), ((70, 6), np.int32), block=(70, 1, 1))
    assert (out == [70, 1, 1, 0, 0, 1]).all()

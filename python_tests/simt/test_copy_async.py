"""cp.async: 16 bytes that are there only after the matching wait, and NaN patterns before."""

import numpy as np
import pytest

from python_tests.simt.support import run
from python_tests.support.backends import SCHEDULES

THREADS, TILES = 40, 7


def pipeline(name, depth, tiles=TILES):
    x = np.arange(1, tiles * THREADS * 4 + 1, dtype=np.float32).reshape(tiles, THREADS, 4)
    out = run(
        name,
        (x,),
        (x.shape, np.float32),
        n=tiles,
        block=(THREADS, 1, 1),
        shared=depth * THREADS * 16,
    )
    x[:, -1] = 0  # the last thread copies zeros
    return out, np.roll(x, -1, axis=1)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("tiles", [0, 1, TILES])
def test_groups_in_flight(depth, tiles):
    out, expected = pipeline(f"copy_{depth}", depth, tiles)
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_thread_order_changes_no_bit(schedule):
    with schedule:
        out, expected = pipeline("copy_3", 3)
    assert np.array_equal(out, expected)


def test_reading_before_the_wait_gives_nan():
    out, expected = pipeline("bad_copy_wait", 2)
    assert np.isnan(out[:2]).all()
    assert not (out == expected)[:, :-2].any()  # later tiles find what an earlier one left


def test_reading_a_neighbours_copy_without_a_barrier_gives_nan():
    out, expected = pipeline("bad_copy_barrier", 2)
    assert np.isnan(out[0]).any() and not np.array_equal(out, expected)


@pytest.mark.parametrize(
    "n, message",
    [(0, "addresses to be multiples"), (1, "addresses to be multiples"), (2, "in shared memory")],
)
def test_rejects_a_bad_address(n, message):
    with pytest.raises(
        RuntimeError, match=rf"bad_copy: cp_async_16: expected .*{message}.*thread 0"
    ):
        run("bad_copy", (np.zeros(32, np.uint8),), ((32,), np.uint8), n=n, shared=64)

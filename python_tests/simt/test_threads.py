"""Blocks, barriers, warps and schedules of the shim, against numpy."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from python_tests.simt.support import run
from python_tests.support.backends import SCHEDULES, Schedule

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "grid, block", [((1, 1, 1), (1, 1, 1)), ((3, 2, 2), (5, 3, 4)), ((2, 1, 1), (1024, 1, 1))]
)
def test_every_thread_runs_once_and_knows_its_place(grid, block):
    blocks, threads = np.prod(grid), np.prod(block)
    out = run("place", out=((blocks, threads, 8), np.uint32), grid=grid, block=block)
    b, t = np.divmod(np.arange(blocks * threads), threads)

    def places(i, d):
        return np.stack([i % d[0], i // d[0] % d[1], i // d[0] // d[1]], -1)

    expected = np.column_stack([places(b, grid), places(t, block), t % 32, t // 32])
    assert np.array_equal(out.reshape(-1, 8), expected)


def block_sum(n, threads=128):
    x = RNG.integers(1, 100, threads).astype(np.float32)
    out = run("block_sum", (x,), ((1,), np.float32), n, block=(threads, 1, 1), shared=4 * threads)
    return out[0], x.sum()


@pytest.mark.parametrize("schedule", [Schedule(0), *SCHEDULES])
def test_barriers_part_the_steps_of_a_reduction(schedule):
    with schedule:
        total, expected = block_sum(0)
    assert total == expected


def test_a_missing_barrier_is_noticed():
    results = []
    for schedule in (Schedule(0), Schedule(1), Schedule(2)):
        with schedule:
            total, expected = block_sum(1)
            results.append(total == expected)
    assert not all(results)


def test_missing_initialisation_is_noticed():
    assert np.isnan(block_sum(2)[0])


def test_uninitialised_shared_memory_holds_nan_patterns_in_every_block():
    out = run("bad_uninitialised", out=np.zeros(32, np.uint32), grid=(2, 1, 1), shared=128)
    assert (out == 0xFFFFFFFF).all()


@pytest.mark.parametrize("votes", ["none", "some", "all"])
@pytest.mark.parametrize("schedule", [Schedule(0), *SCHEDULES])
def test_block_votes(votes, schedule):
    v = {"none": np.zeros(70), "some": RNG.integers(0, 2, 70), "all": 3 * np.ones(70)}[votes]
    with schedule:
        out = run("block_votes", (v.astype(np.int32),), ((70, 6), np.int32), block=(70, 1, 1))
    count = np.count_nonzero(v)
    assert (out == [count, count > 0, count == 70, 70 - count, 0, 1]).all()


def float_bits(x, dtype):
    return np.asarray(x, dtype).view(np.uint32)


def same_group(i, j, width):
    return j >= 0 and i // width == j // width


def integer_functions(x):
    """__popc, __ffs and __clz of 32 bits, then of x << 20 in 64 bits, as the kernel packs them."""
    word = f"{x:032b}"
    ones, lowest, highest = word.count("1"), word[::-1].find("1"), word.find("1")
    if ones == 0:
        return [32 << 16, 64 << 16]
    return [
        ones | (lowest + 1) << 8 | highest << 16,
        ones | (lowest + 21) << 8 | (highest + 12) << 16,
    ]


def warp_calls(v, lanes):
    """What warp_calls_kernel gives one warp, lane by lane, from the CUDA programming guide."""
    s = v.astype(np.int32)
    nan = np.uint32(0xFFFFFFFF)  # read from a lane that the mask does not name
    values = np.append(v, np.full(32 - lanes, nan))
    rows = []
    for i in range(lanes):
        sources = [3, i // 8 * 8 + (i + 5) % 8, i ^ 1]
        sources += [i ^ 6 if (i ^ 6) < i // 4 * 4 + 4 else i]
        sources += [j if same_group(i, j, w) else i for j, w in ((i + 1, 32), (i + 3, 8))]
        sources += [j if same_group(i, j, w) else i for j, w in ((i - 1, 32), (i - 3, 8))]
        row = [values[j] for j in sources]
        if (i ^ 1) < lanes:
            row += [*float_bits([s[i ^ 1]], np.float32), *float_bits([s[i ^ 1] / 3], np.float64)]
        else:
            row += [nan] * 3
        same = sum(1 << j for j in range(lanes) if v[j] % 4 == v[i] % 4)
        row += [sum(1 << j for j in range(lanes) if v[j] % 3 == 0)]
        row += [(v == 7).any(), (v != 7).all(), same, same]
        row += [int(v.sum(dtype=np.uint64)) % 2**32, v.max(), v.min()]
        row += [int(x) % 2**32 for x in (s.sum(dtype=np.int64), s.max(), s.min())]
        rows.append(row + integer_functions(int(v[i])))
    return np.array(rows, np.uint64).astype(np.uint32)


@pytest.mark.parametrize("schedule", [Schedule(0), *SCHEDULES])
@pytest.mark.parametrize("lanes", [32, 20, 1])
def test_warp_calls(lanes, schedule):
    v = RNG.integers(0, 2**32, 64, dtype=np.uint32)
    v[:4], v[40:43] = [7, 0, 1, 3], [2**31, 2**31 - 1, 9]
    with schedule:
        out = run("warp_calls", (v,), ((64, 24), np.uint32), lanes, block=(64, 1, 1))
    for warp in (0, 32):
        expected = warp_calls(v[warp : warp + lanes], lanes)
        np.testing.assert_array_equal(out[warp : warp + lanes], expected)
        assert (out[warp + lanes : warp + 32] == 0xFFFFFFFF).all()


def test_shuffle_from_outside_the_mask_gives_nan():
    assert np.isnan(run("bad_shuffle", out=((16,), np.float32))).all()


def test_atomics_wrap():
    v = RNG.integers(-(2**31), 2**31, 150).astype(np.int32)
    out = run("atomics", (v,), np.zeros(4, np.uint32), grid=(2, 1, 1), block=(75, 1, 1))
    total = int(v.sum(dtype=np.int64))
    assert out[0] == out[1] == total % 2**32
    assert out[2:].view(np.uint64)[0] == total % 2**64


def test_fma_rounds_once():
    x = np.array([1 + 2**-12, 1 - 2**-12, -1], np.float64)
    out = run("fma", (x,), ((2,), np.float64))
    assert out[0] == -(2.0**-24)  # float32 would round the product to 1
    x = np.array([1 + 2**-30, 1 - 2**-30, -1], np.float64)
    assert run("fma", (x,), ((2,), np.float64))[1] == -(2.0**-60)


def order(schedule, pieces=2, blocks=3, threads=40):
    with schedule:
        count = blocks * threads * pieces
        out = run(
            "order",
            (np.zeros(1, np.uint32),),
            ((count,), np.uint32),
            pieces,
            grid=(blocks, 1, 1),
            block=(threads, 1, 1),
        )
    return out.reshape(blocks, pieces, threads)  # who ran, in the order of time


def test_schedules_are_what_they_say():
    forward = np.broadcast_to(np.arange(120).reshape(3, 1, 40), (3, 2, 40))
    assert np.array_equal(order(Schedule(0)), forward)
    assert np.array_equal(order(Schedule(1)), forward[::-1, :, ::-1])
    shuffled = order(Schedule(2))
    assert np.array_equal(np.sort(shuffled), forward[shuffled[:, 0, 0] // 40])
    assert not np.array_equal(shuffled[:, 0], shuffled[:, 1])
    assert np.array_equal(shuffled, order(Schedule(2)))


def test_a_deep_call_fits_the_stack_of_every_thread():
    depth = 60  # KiB
    out = run("stack", out=((64,), np.uint32), n=depth, block=(64, 1, 1))
    assert (out == sum(range(depth + 1))).all()


def test_launches_from_several_threads_take_turns():
    def launch(seed):
        votes = np.random.default_rng(seed).integers(0, 2, 70).astype(np.int32)
        if seed % 3 == 0:
            with pytest.raises(RuntimeError, match="left the block"):
                run("bad_leave", n=3, block=(70, 1, 1))
        out = run("block_votes", (votes,), ((70, 6), np.int32), block=(70, 1, 1))
        return (out[:, 0] == votes.sum()).all()

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(launch, range(60)))


def test_store_16():
    x = np.arange(3 * 4, dtype=np.uint32).reshape(3, 4)
    out = run("store_16", (x,), ((4, 4), np.uint32), n=16, block=(3, 1, 1))
    assert np.array_equal(out[1:], x) and np.array_equal(out[0], np.full(4, 2**32 - 1))

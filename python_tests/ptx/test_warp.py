"""Exchange between the lanes of a warp, and lanes that are missing."""

import numpy as np
import pytest

from python_tests.ptx.support import POISON, run
from python_tests.support.ptx import VMError

LANES = np.arange(32)
ALL = 0xFFFFFFFF
STORE = "add.u64 %q10, %q0, %q8;\nst.global.u32 [%q10], %r5;"


def lanes(text, **options):
    out, statistics = run(text + STORE, np.zeros(32, np.uint32), **options)
    return out, statistics


SHUFFLES = {
    "up.b32": (3, 0, np.where(LANES >= 3, LANES - 3, LANES)),
    "down.b32": (5, 31, np.where(LANES + 5 < 32, LANES + 5, LANES)),
    "bfly.b32": (6, 31, LANES ^ 6),
    "idx.b32": (9, 31, np.full(32, 9)),
    # Segments of 8 lanes: the bits of the lane above the clamp are kept.
    "up.b32 in segments": (3, 0x1800, np.where(LANES % 8 >= 3, LANES - 3, LANES)),
    "down.b32 in segments": (5, 0x181F, np.where(LANES % 8 + 5 < 8, LANES + 5, LANES)),
    "idx.b32 in segments": (9, 0x181F, LANES // 8 * 8 + 1),
}


@pytest.mark.parametrize("name", SHUFFLES)
def test_shfl(name):
    distance, clamp, source = SHUFFLES[name]
    text = f"""
    mul.lo.u32 %r4, %r1, 7;
    shfl.sync.{name.split()[0]} %r5|%p1, %r4, {distance}, {clamp}, {ALL};
    selp.u32 %r6, 1000, 0, %p1;
    add.u32 %r5, %r5, %r6;
    """
    inside = source != LANES
    if name.startswith("idx"):
        inside = np.full(32, True)
    np.testing.assert_array_equal(lanes(text)[0], source * 7 + 1000 * inside)


def test_shfl_from_a_lane_that_is_not_there_is_poison_and_counted():
    text = f"""
    mov.u32 %r5, %r1;
    setp.lt.u32 %p1, %r1, 16;
    @%p1 shfl.sync.idx.b32 %r5, %r1, 20, 31, {0xFFFF};
    """
    out, statistics = lanes(text)
    assert (out[:16] == POISON).all() and (out[16:] == LANES[16:]).all()
    assert statistics["shfl_undefined_reads"] == 16


VOTES = {"all": (False, False, True), "any": (True, False, True), "uni": (False, True, True)}


@pytest.mark.parametrize("limit, which", [(7, 0), (0, 1), (32, 2)])
@pytest.mark.parametrize("kind", VOTES)
def test_vote(kind, limit, which):
    text = f"""
    setp.lt.u32 %p1, %r1, {limit};
    vote.sync.{kind}.pred %p2, %p1, {ALL};
    vote.sync.ballot.b32 %r6, !%p1, {ALL};
    selp.u32 %r5, 1, 0, %p2;
    shr.u32 %r6, %r6, %r1;
    and.b32 %r6, %r6, 1;
    mad.lo.u32 %r5, %r6, 2, %r5;
    """
    expected = int(VOTES[kind][which]) + 2 * (limit <= LANES)
    np.testing.assert_array_equal(lanes(text)[0], expected)


def test_match():
    text = f"""
    and.b32 %r4, %r1, 3;
    match.any.sync.b32 %r5, %r4, {ALL};
    match.all.sync.b32 %r6|%p1, %r4, {ALL};
    match.all.sync.b32 %r7|%p2, 5, {ALL};
    selp.u32 %r8, 2, 0, %p1;
    selp.u32 %r9, 4, 0, %p2;
    add.u32 %r8, %r8, %r9;
    add.u32 %r5, %r5, %r6;
    add.u32 %r5, %r5, %r7;
    add.u32 %r5, %r5, %r8;
    """
    expected = (0x11111111 << (LANES % 4)) + ALL + 4
    np.testing.assert_array_equal(lanes(text)[0], expected.astype(np.uint64) & ALL)


REDUCTIONS = {
    "add.u32": lambda v: v.sum(dtype=np.uint32),
    "min.u32": np.min,
    "max.u32": np.max,
    "min.s32": lambda v: v.view(np.int32).min().view(np.uint32),
    "max.s32": lambda v: v.view(np.int32).max().view(np.uint32),
    "and.b32": np.bitwise_and.reduce,
    "or.b32": np.bitwise_or.reduce,
    "xor.b32": np.bitwise_xor.reduce,
}


@pytest.mark.parametrize("members", [ALL, 0x0FF0])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_redux(name, members):
    values = np.random.default_rng(2).integers(0, 1 << 32, 32).astype(np.uint32)
    text = f"""
    add.u64 %q10, %q0, %q8;
    ld.global.u32 %r5, [%q10];
    shr.u32 %r6, {members}, %r1;
    and.b32 %r6, %r6, 1;
    setp.eq.u32 %p1, %r6, 1;
    @%p1 redux.sync.{name} %r5, %r5, {members};
    """
    out, _ = run(text + STORE, values)
    inside = (members >> LANES & 1).astype(bool)
    expected = np.where(inside, REDUCTIONS[name](values[inside]), values)
    np.testing.assert_array_equal(out, expected)


def test_elect_takes_one_of_the_members():
    text = """
    mov.u32 %r5, 9;
    setp.lt.u32 %p2, %r1, 4;
    @%p2 bra SKIP;
    elect.sync %r6|%p1, 0xfffffff0;
    selp.u32 %r5, 1, 0, %p1;
    SKIP:
    """
    np.testing.assert_array_equal(lanes(text)[0], [9] * 4 + [1] + [0] * 27)


def test_activemask():
    text = "setp.lt.u32 %p1, %r1, 5;\nmov.u32 %r5, 0;\n@%p1 activemask.b32 %r5;\n"
    np.testing.assert_array_equal(lanes(text)[0], np.where(LANES < 5, 31, 0))


def test_half_a_warp_at_another_instruction_is_a_deadlock():
    text = f"""
    setp.lt.u32 %p1, %r1, 16;
    @%p1 bra HERE;
    shfl.sync.idx.b32 %r5, %r1, 0, 31, {ALL};
    bra DONE;
    HERE:
    bar.warp.sync {ALL};
    DONE:
    """
    with pytest.raises(VMError, match="deadlock"):
        lanes(text)


def test_a_member_mask_without_the_lane_stops():
    with pytest.raises(VMError, match="member mask"):
        lanes("shfl.sync.idx.b32 %r5, %r1, 0, 31, 0xffff;\n")


def test_divergent_lanes_meet_at_the_member_mask():
    text = f"""
    setp.lt.u32 %p1, %r1, 16;
    mov.u32 %r4, 1;
    @%p1 mov.u32 %r4, 2;
    @%p1 bra NEXT;
    add.u32 %r4, %r4, 10;
    NEXT:
    shfl.sync.bfly.b32 %r5, %r4, 16, 31, {ALL};
    """
    np.testing.assert_array_equal(lanes(text)[0], np.where(LANES < 16, 11, 2))


@pytest.mark.parametrize(
    "count, good", [(24, True), (232, True), (20, False), (264, False), (33, False)]
)
def test_setmaxnreg(count, good):
    text = f"setmaxnreg.inc.sync.aligned.u32 {count};\nmov.u32 %r5, 1;\n"
    if good:
        assert lanes(text)[0].all()
    else:
        with pytest.raises(VMError, match=f"setmaxnreg of {count} registers"):
            lanes(text)

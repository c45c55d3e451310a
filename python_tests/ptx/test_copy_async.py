"""cp.async: data arrives at the wait that covers it, for the thread that waits, and not before."""

import numpy as np
import pytest

from python_tests.ptx.support import POISON, await_phase, first_thread, run
from python_tests.support.ptx import VMError

SOURCE = np.arange(1, 513, dtype=np.uint32)
SETUP = """
.shared .align 16 .b8 sm[2048];
.shared .align 8 .b64 bar;
mov.u32 %r4, sm;
mad.lo.u32 %r4, %r0, 16, %r4;
add.u64 %q10, %q0, %q9;
add.u64 %q11, %q1, %q9;
"""
STORE = """
ld.shared.v4.u32 {%r20, %r21, %r22, %r23}, [%r4];
st.global.v4.u32 [%q11], {%r20, %r21, %r22, %r23};
"""


def copied(text, threads=32, store=STORE, **options):
    out = np.zeros(4 * threads, np.uint32)
    return run(SETUP + text + store, SOURCE, out, block=threads, **options)[1]


@pytest.mark.parametrize("wait", ["commit_group;\ncp.async.wait_group 0", "wait_all"])
@pytest.mark.parametrize("form, size", [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)])
def test_copy_and_wait(form, size, wait):
    text = f"cp.async.{form}.shared.global [%r4], [%q10], {size};\ncp.async.{wait};"
    out = copied(text).reshape(32, 4)
    words = size // 4
    np.testing.assert_array_equal(out[:, :words], SOURCE[:128].reshape(32, 4)[:, :words])
    assert (out[:, words:] == POISON).all()


@pytest.mark.parametrize(
    "text",
    [
        "cp.async.cg.shared.global [%r4], [%q10], 16;",
        "cp.async.cg.shared.global [%r4], [%q10], 16;\ncp.async.commit_group;",
        # An empty group committed after it leaves the copy one of the latest two.
        "cp.async.cg.shared.global [%r4], [%q10], 16;\ncp.async.commit_group;\n"
        "cp.async.commit_group;\ncp.async.wait_group 2;",
        # wait_group knows only of committed groups.
        "cp.async.cg.shared.global [%r4], [%q10], 16;\ncp.async.wait_group 0;",
    ],
    ids=["no wait", "no wait after commit", "wait for older groups", "not committed"],
)
def test_missing_wait_reads_poison(text):
    assert (copied(text) == POISON).all()


def test_wait_group_leaves_the_latest_groups():
    text = """
    cp.async.cg.shared.global [%r4], [%q10], 16;
    cp.async.commit_group;
    cp.async.cg.shared.global [%r4+512], [%q10+512], 16;
    cp.async.commit_group;
    cp.async.wait_group 1;
    ld.shared.u32 %r5, [%r4+512];
    st.shared.u32 [%r4+4], %r5;"""
    out = copied(text).reshape(32, 4)
    np.testing.assert_array_equal(out[:, 0], SOURCE[:128:4])
    assert (out[:, 1] == POISON).all()


def test_a_wait_covers_only_the_waiting_thread():
    """A barrier makes the others' data visible only if they have waited."""
    text = """
    cp.async.cg.shared.global [%r4], [%q10], 16;
    cp.async.commit_group;
    setp.lt.u32 %p1, %r0, 16;
    @%p1 cp.async.wait_group 0;
    bar.sync 0;
    mov.u32 %r5, sm;
    xor.b32 %r6, %r0, 31;
    mad.lo.u32 %r4, %r6, 16, %r5;"""
    out = copied(text).reshape(32, 4)
    np.testing.assert_array_equal(out[16:], SOURCE[:128].reshape(32, 4)[15::-1])
    assert (out[:16] == POISON).all()


@pytest.mark.parametrize("count", [0, 4, 8, 12, 16])
def test_source_size_fills_with_zeros(count):
    text = f"""
    mov.u32 %r5, {count};
    cp.async.cg.shared.global [%r4], [%q10], 16, %r5;
    cp.async.wait_all;"""
    expected = SOURCE[:128].reshape(32, 4).copy()
    expected[:, count // 4 :] = 0
    np.testing.assert_array_equal(copied(text).reshape(32, 4), expected)


def test_nothing_is_read_where_the_source_size_is_zero():
    text = """
    mov.u64 %q10, 0;
    mov.u32 %r5, 0;
    cp.async.cg.shared.global [%r4], [%q10], 16, %r5;
    cp.async.wait_all;"""
    assert not copied(text).any()


def test_ignore_source():
    text = """
    and.b32 %r5, %r0, 1;
    setp.eq.u32 %p1, %r5, 1;
    cp.async.cg.shared.global [%r4], [%q10], 16, %p1;
    cp.async.wait_all;"""
    out = copied(text).reshape(32, 4)
    np.testing.assert_array_equal(out[::2], SOURCE[:128].reshape(32, 4)[::2])
    assert not out[1::2].any()


STOPS = {
    "mov.u32 %r5, 17;\ncp.async.cg.shared.global [%r4], [%q10], 16, %r5;": "src-size exceeds",
    "cp.async.cg.shared.global [%r4+4], [%q10], 16;": "misaligned shared",
    "cp.async.cg.shared.global [%r4], [%q10+4], 16;": "misaligned",
    "cp.async.cg.shared.global [%r4], [%q10+4096], 16;": "outside every registered buffer",
    "cp.async.cg.shared.global [%r4+2048], [%q10], 16;": "outside the block's",
}


@pytest.mark.parametrize("text", STOPS)
def test_bad_copy_stops(text):
    with pytest.raises(VMError, match=STOPS[text]):
        copied(text)


ARRIVE = """
cp.async.cg.shared.global [%r4], [%q10], 16;
cp.async.mbarrier.arrive{}.shared::cta.b64 [bar];
"""


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noinc", [True, False])
def test_mbarrier_arrives_when_the_copies_have(noinc, seed):
    """.noinc counts among the expected arrivals; without it the count of the phase grows first."""
    count = 64 if noinc else 1
    text = first_thread(f"mbarrier.init.shared::cta.b64 [bar], {count};") + "bar.sync 0;"
    text += ARRIVE.format(".noinc" if noinc else "")
    if not noinc:
        text += "bar.sync 0;" + first_thread("mbarrier.arrive.shared::cta.b64 _, [bar];")
    text += await_phase("bar") + "mov.u32 %r5, sm;\nxor.b32 %r6, %r0, 63;\n"
    text += "mad.lo.u32 %r4, %r6, 16, %r5;"
    out = copied(text, threads=64, seed=seed).reshape(64, 4)
    np.testing.assert_array_equal(out, SOURCE[:256].reshape(64, 4)[::-1])


def test_without_the_wait_on_the_mbarrier_poison_is_read():
    text = first_thread("mbarrier.init.shared::cta.b64 [bar], 64;") + "bar.sync 0;"
    assert (copied(text + ARRIVE.format(".noinc"), threads=64) == POISON).all()


def test_copies_after_the_arrive_are_not_covered():
    text = first_thread("mbarrier.init.shared::cta.b64 [bar], 32;") + "bar.sync 0;"
    text += ARRIVE.format(".noinc")
    text += "cp.async.cg.shared.global [%r4+512], [%q10+512], 16;" + await_phase("bar")
    text += "add.u32 %r4, %r4, 512;"
    assert (copied(text) == POISON).all()


def test_the_race_check_sees_when_data_lands():
    """The copy writes at the wait; another warp that reads in the same interval races with it."""
    text = """
    cp.async.cg.shared.global [%r4], [%q10], 16;
    cp.async.wait_all;
    xor.b32 %r6, %r0, 32;
    mov.u32 %r5, sm;
    mad.lo.u32 %r4, %r6, 16, %r5;"""
    with pytest.raises(VMError, match="shared-memory hazard"):
        copied(text, threads=64, race=True, race_error=True)
    copied(text.replace("wait_all;", "wait_all;\nbar.sync 0;"), threads=64, race_error=True)

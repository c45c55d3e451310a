"""mbarrier: phases, tokens and parities, transaction counts, and misuse."""

import numpy as np
import pytest

from python_tests.ptx.support import await_phase, first_thread, run
from python_tests.support.ptx import VMError


def started(text, count=1, declarations=""):
    return (
        f".shared .align 8 .b64 bar;\n.shared .align 16 .b8 sm[1024];\n{declarations}"
        + first_thread(f"mbarrier.init.shared::cta.b64 [bar], {count};")
        + "bar.sync 0;\n"
        + text
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("wait", ["test_wait", "try_wait"])
def test_tokens_over_ten_phases(wait, seed):
    """Each round everyone writes, waits, reads another's value, and waits before the next."""
    text = f"""
    mov.u32 %r5, sm;
    mad.lo.u32 %r6, %r0, 4, %r5;
    xor.b32 %r7, %r0, 33;
    mad.lo.u32 %r7, %r7, 4, %r5;
    mov.u32 %r8, 0;
    ROUND:
    mad.lo.u32 %r9, %r8, 100, %r0;
    st.shared.u32 [%r6], %r9;
    mbarrier.arrive.shared::cta.b64 %q10, [bar];
    FIRST:
    mbarrier.{wait}.shared::cta.b64 %p1, [bar], %q10;
    @!%p1 bra FIRST;
    ld.shared.u32 %r10, [%r7];
    mbarrier.arrive.shared::cta.b64 %q10, [bar];
    SECOND:
    mbarrier.{wait}.shared::cta.b64 %p1, [bar], %q10;
    @!%p1 bra SECOND;
    add.u32 %r8, %r8, 1;
    setp.lt.u32 %p2, %r8, 5;
    @%p2 bra ROUND;
    add.u64 %q11, %q0, %q8;
    st.global.u32 [%q11], %r10;"""
    out, _ = run(started(text, 64), np.zeros(64, np.uint32), block=64, seed=seed)
    np.testing.assert_array_equal(out, (np.arange(64) ^ 33) + 400)


def test_parity_of_a_phase_that_is_past_or_to_come():
    """Parity 1 is that of the phase before the first, which counts as complete."""
    text = """
    mbarrier.test_wait.parity.shared::cta.b64 %p1, [bar], 1;
    mbarrier.test_wait.parity.shared::cta.b64 %p2, [bar], 0;
    mbarrier.arrive.shared::cta.b64 _, [bar];
    mbarrier.test_wait.parity.shared::cta.b64 %p3, [bar], 0;
    mbarrier.test_wait.parity.shared::cta.b64 %p4, [bar], 1;
    selp.u32 %r5, 1, 0, %p1;
    selp.u32 %r6, 10, 0, %p2;
    selp.u32 %r7, 100, 0, %p3;
    selp.u32 %r8, 1000, 0, %p4;
    add.u32 %r5, %r5, %r6;
    add.u32 %r7, %r7, %r8;
    add.u32 %r5, %r5, %r7;
    st.global.u32 [%q0], %r5;"""
    out, _ = run(started(text), np.zeros(1, np.uint32), block=1)
    assert out[0] == 101


def test_arrive_with_a_count_and_arrive_drop():
    text = """
    mov.u32 %r5, 3;
    mbarrier.arrive.shared::cta.b64 _, [bar], %r5;
    mbarrier.arrive_drop.shared::cta.b64 _, [bar];
    mbarrier.test_wait.parity.shared::cta.b64 %p1, [bar], 0;
    mbarrier.arrive.shared::cta.b64 _, [bar], %r5;
    mbarrier.test_wait.parity.shared::cta.b64 %p2, [bar], 1;
    selp.u32 %r6, 1, 0, %p1;
    selp.u32 %r7, 2, 0, %p2;
    add.u32 %r6, %r6, %r7;
    st.global.u32 [%q0], %r6;"""
    out, _ = run(started(text, 4), np.zeros(1, np.uint32), block=1)
    assert out[0] == 3


def test_a_phase_waits_for_its_transactions():
    text = """
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 64;
    mbarrier.test_wait.parity.shared::cta.b64 %p1, [bar], 0;
    mbarrier.complete_tx.shared::cta.relaxed.cta.b64 [bar], 60;
    mbarrier.test_wait.parity.shared::cta.b64 %p2, [bar], 0;
    mbarrier.complete_tx.shared::cta.relaxed.cta.b64 [bar], 4;
    mbarrier.test_wait.parity.shared::cta.b64 %p3, [bar], 0;
    mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [bar], 8;
    mbarrier.arrive.shared::cta.b64 _, [bar];
    mbarrier.test_wait.parity.shared::cta.b64 %p4, [bar], 1;
    selp.u32 %r5, 1, 0, %p1;
    selp.u32 %r6, 10, 0, %p2;
    selp.u32 %r7, 100, 0, %p3;
    selp.u32 %r8, 1000, 0, %p4;
    add.u32 %r5, %r5, %r6;
    add.u32 %r7, %r7, %r8;
    add.u32 %r5, %r5, %r7;
    st.global.u32 [%q0], %r5;"""
    out, _ = run(started(text), np.zeros(1, np.uint32), block=1)
    assert out[0] == 100


def test_init_after_inval():
    text = """
    mbarrier.inval.shared::cta.b64 [bar];
    mbarrier.init.shared::cta.b64 [bar], 2;
    mbarrier.arrive.shared::cta.b64 _, [bar];
    mbarrier.test_wait.parity.shared::cta.b64 %p1, [bar], 0;
    selp.u32 %r5, 1, 0, %p1;
    st.global.u32 [%q0], %r5;"""
    out, _ = run(started(text), np.ones(1, np.uint32), block=1)
    assert out[0] == 0


CLUSTER_ARRIVE = """
.reg .b32 %rank;
mov.u32 %rank, %cluster_ctarank;
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
mov.u32 %r5, bar;
mapa.shared::cluster.u32 %r6, %r5, 0;
mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r6];
setp.ne.u32 %p1, %rank, 0;
@%p1 bra LEAVE;
{wait}
st.global.u32 [%q0], 1;
LEAVE:
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;"""


@pytest.mark.parametrize("seed", range(3))
def test_arrivals_from_the_cluster(seed):
    text = CLUSTER_ARRIVE.format(wait=await_phase("bar"))
    options = {"grid": 4, "cluster": 4, "resident": 4, "block": 32, "seed": seed}
    out, _ = run(started(text, 128), np.zeros(1, np.uint32), **options)
    assert out[0] == 1


@pytest.mark.parametrize("seed", range(3))
def test_an_arrival_missing_in_the_cluster(seed):
    text = started(CLUSTER_ARRIVE.format(wait=await_phase("bar")), 129)
    options = {"grid": 4, "cluster": 4, "resident": 4, "block": 32, "seed": seed}
    with pytest.raises(VMError, match="deadlock"):
        run(text, np.zeros(1, np.uint32), **options)


STOPS = {
    "arrive before init": (
        ".shared .align 8 .b64 bar;\nmbarrier.arrive.shared::cta.b64 _, [bar];",
        "not init",
    ),
    "overwritten": (
        started("st.shared.u32 [bar], 1;\nmbarrier.arrive.shared::cta.b64 _, [bar];"),
        "overwritten",
    ),
    "too many arrivals": (
        started("mov.u32 %r5, 3;\nmbarrier.arrive.shared::cta.b64 _, [bar], %r5;", 2),
        "more arrivals than its count",
    ),
    "count of zero": (
        ".shared .align 8 .b64 bar;\nmbarrier.init.shared::cta.b64 [bar], 0;",
        "count 0",
    ),
    "after inval": (
        started("mbarrier.inval.shared::cta.b64 [bar];\nmbarrier.arrive.shared::cta.b64 _, [bar];"),
        "not initialised",
    ),
    "misaligned": (
        ".shared .align 8 .b8 raw[16];\nmbarrier.init.shared::cta.b64 [raw+4], 1;",
        "misaligned",
    ),
    "nobody arrives": (started(await_phase("bar")), "deadlock.*mbarrier"),
    "transactions missing": (
        started("mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 16;" + await_phase("bar")),
        "deadlock.*mbarrier",
    ),
}


@pytest.mark.parametrize("what", STOPS)
def test_misuse_stops(what):
    text, message = STOPS[what]
    with pytest.raises(VMError, match=f"(?s){message}"):
        run(text, np.zeros(1, np.uint32), block=1)

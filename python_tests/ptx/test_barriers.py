"""Barriers of a block and of a cluster, and the deadlocks they make."""

import numpy as np
import pytest

from python_tests.ptx.support import run
from python_tests.support.ptx import VMError

SEEDS = range(4)
SHARED = ".shared .align 16 .b8 sm[1024];\n"
OWN_WORD = "mov.u32 %r2, sm;\nmad.lo.u32 %r3, %r0, 4, %r2;\n"  # %r3: this thread's, %r2: the first


@pytest.mark.parametrize("seed", SEEDS)
def test_producers_arrive_and_consumers_wait(seed):
    body = f"""{SHARED}{OWN_WORD}
    setp.lt.u32 %p0, %r0, 32;
    @!%p0 bra CONSUMER;
    mul.lo.u32 %r5, %r0, 3;
    st.shared.u32 [%r3], %r5;
    bar.arrive 1, 64;
    bra END;
    CONSUMER:
    bar.sync 1, 64;
    ld.shared.u32 %r6, [%r3+-128];
    add.u64 %q4, %q0, %q8;
    st.global.u32 [%q4+-128], %r6;
    END:"""
    out, _ = run(body, np.zeros(32, np.uint32), block=64, seed=seed)
    assert (out == np.arange(32) * 3).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_reductions_at_a_barrier(seed):
    body = """
    and.b32 %r4, %r0, 3;
    setp.eq.u32 %p0, %r4, 1;
    bar.red.popc.u32 %r5, 0, %p0;
    bar.red.popc.u32 %r6, 0, !%p0;
    bar.red.and.pred %p1, 0, %p0;
    bar.red.or.pred %p2, 0, %p0;
    selp.u32 %r7, 1, 0, %p1;
    selp.u32 %r8, 1, 0, %p2;
    add.u64 %q4, %q0, %q9;
    st.global.v4.u32 [%q4], {%r5, %r6, %r7, %r8};"""
    out, _ = run(body, np.zeros((64, 4), np.uint32), block=64, seed=seed)
    assert (out == [16, 48, 0, 1]).all()


def test_the_whole_block_with_and_without_a_count_is_one_barrier():
    body = """
    setp.lt.u32 %p0, %r0, 32;
    @%p0 bra FIRST;
    bar.sync 0, 64;
    bra END;
    FIRST: bar.sync 0;
    END:"""
    (statistics,) = run(body, block=64)[-1:]
    assert statistics["barriers"] == 1


def test_threads_that_have_left_are_not_waited_for_but_counted():
    body = "setp.lt.u32 %p0, %r0, 32;\n@%p0 ret;\nbar.sync 0;"
    statistics = run(body, block=64)[-1]
    assert statistics["barriers_with_exited_threads"] == 1


@pytest.mark.parametrize(
    "body, message",
    [
        (
            "setp.lt.u32 %p0, %r0, 32;\n@%p0 bar.sync 1, 64;",
            "deadlock.*wait at barrier.*bar.sync 1",
        ),
        ("bar.sync 16;", "no barrier 16"),
        ("bar.sync 1, 33;", "not a multiple of the warp size"),
        ("bar.arrive 1, 32;\nbar.sync 1, 32;\nbar.sync 1, 32;", ""),
        (  # 20 + 32 + 20 threads
            "setp.lt.u32 %p0, %r1, 20;\n@%p0 barrier.arrive 1, 64;\nbarrier.arrive 1, 64;",
            "more threads arrived",
        ),
        (
            "setp.lt.u32 %p0, %r0, 32;\n@%p0 bra A;\nbar.sync 1, 96;\nA: bar.sync 1, 128;",
            "different thread counts",
        ),
        (
            "and.b32 %r4, %r0, 1;\nsetp.eq.u32 %p0, %r4, 1;\n@%p0 bra A;\nbar.sync 1, 32;\nret;\n"
            "A: bar.sync 2, 32;",
            "deadlock.*rest of the warp",
        ),
    ],
)
def test_misuse(body, message):
    if not message:
        run(body, block=64)
        return
    with pytest.raises(VMError, match=f"(?s){message}"):
        run(body, block=64)


EXCHANGE = f"""{SHARED}{OWN_WORD}
    mov.u32 %r4, %cluster_ctarank;
    mov.u32 %r12, %ctaid.x;
    mad.lo.u32 %r5, %r12, 1000, %r0;
    st.shared.u32 [%r3], %r5;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    xor.b32 %r6, %r4, 1;
    mapa.shared::cluster.u32 %r7, %r3, %r6;
    ld.shared::cluster.u32 %r10, [%r7];
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    mad.lo.u32 %r11, %r12, 64, %r0;
    mad.wide.u32 %q4, %r11, 4, %q0;
    st.global.u32 [%q4], %r10;"""


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_of_a_cluster_read_each_other_s_shared_memory(seed):
    out, _ = run(EXCHANGE, np.zeros((4, 64), np.uint32), grid=4, block=64, cluster=2, seed=seed)
    assert (out == np.array([1, 0, 3, 2])[:, None] * 1000 + np.arange(64)).all()


def test_shared_memory_of_a_block_that_has_left():
    last = EXCHANGE.rindex("barrier.cluster.arrive")
    body = EXCHANGE[: EXCHANGE.index("mapa")] + "setp.eq.u32 %p0, %r4, 1;\n@%p0 ret;\n"
    body += "mov.u32 %r9, 0;\nLATER: add.u32 %r9, %r9, 1;\nsetp.lt.u32 %p1, %r9, 300000;\n"
    body += "@%p1 bra LATER;\n" + EXCHANGE[EXCHANGE.index("mapa") : last]
    with pytest.raises(VMError, match="block that has exited"):
        run(body, np.zeros((2, 64), np.uint32), grid=2, block=64, cluster=2)


@pytest.mark.parametrize(
    "body, message",
    [
        (
            "barrier.cluster.arrive.aligned;\nbarrier.cluster.arrive.aligned;",
            "twice without a wait",
        ),
        ("mapa.shared::cluster.u32 %r7, %r0, 2;", "rank"),
    ],
)
def test_misuse_of_a_cluster(body, message):
    with pytest.raises(VMError, match=message):
        run(body, grid=2, block=64, cluster=2)


def test_lanes_park_until_the_warp_is_whole():
    body = """
    setp.lt.u32 %p0, %r1, 5;
    @%p0 bra SLOW;
    bra MEET;
    SLOW: add.u32 %r4, %r1, 1;
    MEET: bar.sync 0;"""
    assert run(body, block=64)[-1]["barriers"] == 1

"""cp.async.bulk: loads land at their mbarrier, stores read late; reductions, multicast."""

import numpy as np
import pytest

from python_tests.ptx.support import POISON, await_phase, first_thread, from_shared, run
from python_tests.support.ptx import VMError

SOURCE = np.arange(1, 1025, dtype=np.uint32)
SHARED = ".shared .align 128 .b8 sm[8192];\n.shared .align 8 .b64 bar;\n"
START = SHARED + first_thread("mbarrier.init.shared::cta.b64 [bar], 1;") + "bar.sync 0;\n"
LOAD = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [sm], [%q0], {0}, [bar];"


def expect(count):
    return f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {count};"


def loaded(*steps, **options):
    text = START + "".join(steps) + from_shared("%q1", "sm", 4096)
    return run(text, SOURCE, np.zeros(1024, np.uint32), block=128, **options)[1]


@pytest.mark.parametrize("seed", range(4))
def test_load(seed):
    out = loaded(first_thread(expect(4096), LOAD.format(4096)), await_phase("bar"), seed=seed)
    np.testing.assert_array_equal(out, SOURCE)


def test_a_load_nobody_waited_for_reads_as_poison():
    assert (loaded(first_thread(expect(4096), LOAD.format(4096))) == POISON).all()


@pytest.mark.parametrize("expected", [4096 + 16, 4096 - 16])
def test_a_phase_with_the_wrong_number_of_bytes_does_not_end(expected):
    with pytest.raises(VMError, match=r"(?s)deadlock.*mbarrier"):
        loaded(first_thread(expect(expected), LOAD.format(4096)), await_phase("bar"))


STOPS = {
    "size": (LOAD.format(24), "not a multiple of 16"),
    "source alignment": (LOAD.format(16).replace("%q0", "%q0+8"), "misaligned cp.async.bulk"),
    "target alignment": (LOAD.format(16).replace("[sm]", "[sm+4]"), "misaligned cp.async.bulk"),
    "beyond the source": (LOAD.format(8192), "outside every registered buffer"),
    "beyond shared memory": (LOAD.format(4096).replace("[sm]", "[sm+4224]"), "outside the block"),
    "no mbarrier": (LOAD.format(16).replace("bar];", "sm+64];"), "was not initialised"),
}


@pytest.mark.parametrize("what", STOPS)
def test_bad_load_stops(what):
    text, message = STOPS[what]
    with pytest.raises(VMError, match=message):
        loaded(first_thread(expect(16), text))


FILL = """
mov.u32 %r2, sm;
mad.lo.u32 %r3, %r0, 4, %r2;
st.shared.u32 [%r3], %r0;
"""
FENCE = "fence.proxy.async.shared::cta;\n"
STORE = "cp.async.bulk.global.shared::cta.bulk_group [%q0], [sm], 256;"
COMMIT = "cp.async.bulk.commit_group;"
WAIT = "cp.async.bulk.wait_group 0;"
WAIT_READ = "cp.async.bulk.wait_group.read 0;"


def stored(*steps, start=None, **options):
    start = np.full(64, 7, np.uint32) if start is None else start
    return run(SHARED + "".join(steps), start, block=64, **options)[0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("wait", [WAIT, WAIT_READ])
def test_store(wait, seed):
    out = stored(FILL, FENCE, "bar.sync 0;", first_thread(STORE, COMMIT, wait), seed=seed)
    np.testing.assert_array_equal(out, np.arange(64))


REDUCE = "cp.reduce.async.bulk.global.shared::cta.bulk_group.{} [%q0], [sm], 256;"


@pytest.mark.parametrize("operation", ["add.u32", "min.u32", "max.s32", "and.b32", "xor.b32"])
def test_reduction_into_global_memory(operation):
    out = stored(FILL, FENCE, "bar.sync 0;", first_thread(REDUCE.format(operation), COMMIT, WAIT))
    f = {"add": np.add, "min": np.minimum, "max": np.maximum}
    f |= {"and": np.bitwise_and, "xor": np.bitwise_xor}
    expected = f[operation.split(".")[0]](np.full(64, 7), np.arange(64))
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("wait", ["", WAIT_READ, WAIT])
def test_the_source_may_change_only_after_the_wait(wait):
    """Even seeds read as late, odd seeds as early as they may: one of them shows the change."""
    outs = [
        stored(
            FILL,
            FENCE,
            "bar.sync 0;",
            first_thread(STORE, COMMIT, *[wait] * bool(wait)),
            "bar.sync 0;\nst.shared.u32 [%r3], 12345;\nbar.sync 0;\n",
            first_thread(WAIT),
            seed=seed,
        )
        for seed in (0, 1)
    ]
    same = all((out == np.arange(64)).all() for out in outs)
    assert same == bool(wait)


@pytest.mark.parametrize(
    "steps, noticed",
    [
        ((FILL, "bar.sync 0;", first_thread(STORE, COMMIT, WAIT)), True),
        ((FILL, FENCE, "bar.sync 0;", first_thread(STORE, COMMIT, WAIT)), False),
        # A fence before the store does not help.
        ((FENCE, FILL, "bar.sync 0;", first_thread(STORE, COMMIT, WAIT)), True),
        # One thread's fence is for its own stores ...
        ((FILL, "setp.lt.u32 %p1, %r0, 32;\n@%p1 " + FENCE, "bar.sync 0;",
          "setp.eq.u32 %p8, %r0, 40;\n", *[f"@%p8 {s}\n" for s in (STORE, COMMIT, WAIT)]), True),
        # ... and for those of others that it has waited for, before a copy of its own.
        ((FILL, "bar.sync 0;", first_thread(FENCE, STORE, COMMIT, WAIT)), False),
        ((FILL, "fence.proxy.async.global;", "bar.sync 0;", first_thread(STORE, COMMIT, WAIT)),
         True),
        ((FILL, "fence.proxy.async;", "bar.sync 0;", first_thread(STORE, COMMIT, WAIT)), False),
    ],
    ids=["none", "writer", "too early", "another's", "issuer", "global only", "all spaces"],
)  # fmt: skip
def test_a_store_needs_the_proxy_fence(steps, noticed):
    if noticed:
        with pytest.raises(VMError, match=r"missing fence\.proxy\.async"):
            stored(*steps)
    else:
        np.testing.assert_array_equal(stored(*steps), np.arange(64))


def test_what_a_bulk_load_wrote_needs_no_fence():
    steps = (
        FILL,
        first_thread("mbarrier.init.shared::cta.b64 [bar], 1;"),
        FENCE + "bar.sync 0;\n",
        FILL,
        "bar.sync 0;",
        first_thread(
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 256;",
            LOAD.format(256),
        ),
        await_phase("bar"),
        first_thread("cp.async.bulk.global.shared::cta.bulk_group [%q0], [sm], 256;", COMMIT, WAIT),
    )
    start = np.arange(64, dtype=np.uint32) * 3
    np.testing.assert_array_equal(stored(*steps, start=start.copy()), start)


MULTICAST = """
.reg .b32 %rank;
mov.u32 %rank, %cluster_ctarank;
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
setp.eq.u32 %p1, %r0, 0;
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 256;
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
setp.eq.u32 %p2, %rank, 1;
and.pred %p2, %p2, %p1;
mov.u16 %h1, {mask};
@%p2 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster \
[sm], [%q0], 256, [bar], %h1;
"""


@pytest.mark.parametrize("seed", range(3))
def test_multicast_fills_every_block_at_the_same_place(seed):
    text = START + MULTICAST.format(mask=15) + await_phase("bar")
    text += "mov.u32 %r4, %ctaid.x;\nmad.wide.u32 %q1, %r4, 256, %q1;\n"
    text += from_shared("%q1", "sm", 256) + "barrier.cluster.arrive.aligned;\n"
    text += "barrier.cluster.wait.aligned;"
    _, out, _ = run(
        text,
        SOURCE,
        np.zeros((4, 64), np.uint32),
        grid=4,
        cluster=4,
        resident=4,
        block=64,
        seed=seed,
    )
    for block in out:
        np.testing.assert_array_equal(block, SOURCE[:64])


@pytest.mark.parametrize("mask", [0, 31])
def test_multicast_to_no_block_or_outside_the_cluster_stops(mask):
    with pytest.raises(VMError, match="multicast mask"):
        run(START + MULTICAST.format(mask=mask), SOURCE, grid=4, cluster=4, resident=4, block=32)


def test_st_async_counts_on_the_mbarrier_of_the_block_it_goes_to():
    text = (
        START
        + first_thread(expect(4 * 32))
        + """
    .reg .b32 %rank;
    barrier.cluster.arrive.aligned;
    barrier.cluster.wait.aligned;
    mov.u32 %rank, %cluster_ctarank;
    xor.b32 %r5, %rank, 1;
    mov.u32 %r6, sm;
    mad.lo.u32 %r6, %r0, 4, %r6;
    mapa.shared::cluster.u32 %r6, %r6, %r5;
    mov.u32 %r7, bar;
    mapa.shared::cluster.u32 %r7, %r7, %r5;
    mad.lo.u32 %r8, %rank, 100, %r0;
    st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r6], %r8, [%r7];
    """
        + await_phase("bar")
    )
    text += "mad.wide.u32 %q0, %rank, 128, %q0;\n" + from_shared("%q0", "sm", 128)
    text += "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;"
    out, _ = run(text, np.zeros((2, 32), np.uint32), grid=2, cluster=2, resident=2, block=32)
    np.testing.assert_array_equal(out, np.arange(32) + np.array([[100], [0]]))

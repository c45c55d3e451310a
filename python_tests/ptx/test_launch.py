"""What a launch is given, in which order its blocks and warps run, and what it reports."""

import numpy as np
import pytest

from python_tests.ptx.support import HEADER, entry, module, run
from python_tests.support.ptx import Module, VMError

SPECIAL = [
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    *("%laneid", "%warpid", "%nwarpid", "%cluster_ctarank", "%clusterid.x", "%nclusterid.x"),
    *(f"%lanemask_{name}" for name in ("eq", "lt", "le", "ge", "gt")),
]


def test_special_registers():
    stores = "".join(
        f"mov.u32 %r4, {name};\nst.global.u32 [%q4+{4 * i}], %r4;\n"
        for i, name in enumerate(SPECIAL)
    )
    body = f"""
    mov.u32 %r5, %ctaid.z; mov.u32 %r6, %nctaid.y; mov.u32 %r7, %ctaid.y;
    mad.lo.u32 %r5, %r5, %r6, %r7;
    mov.u32 %r6, %nctaid.x; mov.u32 %r7, %ctaid.x;
    mad.lo.u32 %r5, %r5, %r6, %r7;
    mov.u32 %r6, %tid.z; mov.u32 %r7, %tid.y;
    mad.lo.u32 %r6, %r6, 5, %r7;
    mad.lo.u32 %r6, %r6, 7, %r0;
    mad.lo.u32 %r5, %r5, 70, %r6;
    mad.wide.u32 %q4, %r5, {4 * len(SPECIAL)}, %q0;
    {stores}"""
    grid, block = (4, 3, 2), (7, 5, 2)
    out, _ = run(
        body, np.zeros((24 * 70, len(SPECIAL)), np.uint32), grid=grid, block=block, cluster=2
    )
    for number, row in enumerate(out):
        b, t = divmod(number, 70)
        tid, ctaid = (t % 7, t // 7 % 5, t // 35), (b % 4, b // 4 % 3, b // 12)
        lane = t % 32
        masks = [1 << lane, (1 << lane) - 1, (2 << lane) - 1, -(1 << lane), -(2 << lane)]
        want = [*tid, *block, *ctaid, *grid, lane, t // 32, 3, ctaid[0] % 2, ctaid[0] // 2, 2]
        assert list(row) == want + [m & 0xFFFFFFFF for m in masks]


TICKET = """
    setp.ne.u32 %p0, %r0, 0;
    @%p0 ret;
    atom.global.add.u32 %r4, [%q0], 1;
    mov.u32 %r5, %ctaid.x;
    mad.wide.u32 %q4, %r4, 4, %q1;
    st.global.u32 [%q4], %r5;"""


@pytest.mark.parametrize("order", ["linear", "reverse", "random"])
def test_order_of_blocks(order):
    _, blocks, statistics = run(
        TICKET, np.zeros(1, np.uint32), np.zeros(16, np.uint32), grid=16, order=order, seed=2
    )
    assert statistics["blocks"] == 16
    straight = list(range(16))
    if order == "random":
        assert sorted(blocks) == straight
        assert list(blocks) not in (straight, straight[::-1])
    else:
        assert list(blocks) == (straight if order == "linear" else straight[::-1])


MEETING = """
    setp.ne.u32 %p0, %r0, 0;
    @%p0 bra END;
    red.global.add.u32 [%q0], 1;
    mov.u32 %r5, %nctaid.x;
    WAIT: ld.volatile.global.u32 %r4, [%q0];
    setp.lt.u32 %p1, %r4, %r5;
    @%p1 bra WAIT;
    END: bar.sync 0;"""


@pytest.mark.parametrize("seed", (0, 3))
def test_blocks_that_wait_for_each_other_must_live_at_one_time(seed):
    run(MEETING, np.zeros(1, np.uint32), grid=8, block=64, resident=8, seed=seed)
    with pytest.raises(VMError, match="step limit"):
        run(
            MEETING,
            np.zeros(1, np.uint32),
            grid=8,
            block=64,
            resident=7,
            max_steps=200_000,
            seed=seed,
        )


def test_time_limit():
    with pytest.raises(VMError, match="time limit"):
        run("FOREVER: bra FOREVER;", timeout=0.1)


def test_a_seed_gives_one_schedule_and_another_another():
    # Warps of a block race for the ticket; only the schedule decides.
    body = TICKET.replace("%r0, 0", "%r1, 0").replace("%ctaid.x", "%warpid")
    loop = "mov.u32 %r9, 0;\nWORK: add.u32 %r9, %r9, 1;\nsetp.lt.u32 %p1, %r9, 50;\n@%p1 bra WORK;"

    def order(seed):
        arrays = np.zeros(1, np.uint32), np.zeros(32, np.uint32)
        return tuple(run(loop + body, *arrays, block=1024, seed=seed)[1])

    orders = [order(seed) for seed in range(4)]
    assert len(set(orders)) == 4
    assert all(sorted(o) == list(range(32)) for o in orders)
    assert order(3) == orders[3]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"grid": 0}, "must be positive"),
        ({"grid": 3, "cluster": 2}, "multiple of the cluster"),
        ({"block": 1025}, "more than 1024 threads"),
        ({"block": 64}, "maxntid"),
        ({"smem": 228 * 1024}, "227 KiB"),
        ({"params": b"1234"}, "takes 8 bytes of parameters, 4 were passed"),
    ],
)
def test_bad_launch(options, message):
    m = module(entry("", parameters=1, directives=".maxntid 32, 1, 1"))
    given = {"grid": 1, "block": 32, "params": bytes(8)} | options
    with pytest.raises(VMError, match=message):
        m.launch("k", **given)


def test_required_threads():
    m = module(entry("", parameters=1, directives=".reqntid 64"))
    m.launch("k", 1, 64, args=[None])
    with pytest.raises(VMError, match="reqntid"):
        m.launch("k", 1, 32, args=[None])


def test_buffers_may_not_overlap():
    m = module(entry("", parameters=1))
    a = np.zeros(8, np.uint32)
    m.register(a, "whole")
    m.register(a[4:], "half")
    with pytest.raises(VMError, match="half overlaps whole"):
        m.launch("k", 1, 32, args=[None])


def test_dynamic_shared_memory_lies_behind_the_static():
    text = f"""{HEADER}
.extern .shared .align 16 .b8 dynamic[];
.visible .entry k(.param .u64 p)
{{
  .shared .align 4 .b8 fixed[20];
  .reg .b32 %r<5>; .reg .b64 %q;
  ld.param.u64 %q, [p];
  mov.u32 %r0, dynamic; mov.u32 %r1, fixed; sub.u32 %r2, %r0, %r1;
  mov.u32 %r3, %dynamic_smem_size; mov.u32 %r4, %total_smem_size;
  st.global.u32 [%q], %r2; st.global.u32 [%q+4], %r3; st.global.u32 [%q+8], %r4;
}}
"""
    m = Module(text)
    out = m.alloc(np.zeros(3, np.uint32))
    statistics = m.launch("k", 1, 32, smem=100, args=[out])
    assert list(out) == [32, 100, 132]
    assert statistics["shared_bytes_per_block"] == 132


def test_every_kernel_lays_out_its_own_shared_memory():
    place = ".shared .align 4 .b8 {}[64];\nmov.u32 %r4, {};\nst.global.u32 [%q0], %r4;"
    m = module(*(entry(place.format(v, v), v, parameters=1) for v in ("first", "second")))
    out = m.alloc(np.zeros(1, np.uint32))
    for name in ("first", "second", "first"):
        m.launch(name, 1, 32, args=[out])
        assert out[0] == 1024


def test_counts_of_instructions():
    body = "setp.lt.u32 %p0, %r0, 8;\n@%p0 mov.u32 %r4, 1;\nbar.sync 0;\nfence.acq_rel.gpu;"
    statistics = run(body, block=64, grid=3, profile=True)[-1]
    assert statistics["blocks"] == 3
    assert statistics["ops"]["bar.sync"] == [6, 192]
    assert statistics["ops"]["setp"] == [6, 192]
    assert statistics["barriers"] == 3
    assert statistics["fences"] == 6
    (guarded,) = (p for p in statistics["profile"] if p[3].startswith("@%p0 mov"))
    assert guarded[1:3] == [6, 3 * 8]
    assert statistics["warp_instructions"] == sum(p[1] for p in statistics["profile"])
    assert statistics["lane_instructions"] == sum(p[2] for p in statistics["profile"])


def test_counts_of_matrix_operations():
    mma = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    body = "mov.f32 %f0, 0f00000000;\nmov.u32 %r4, 0;\n"
    body += f"{mma} {{%f0,%f1,%f2,%f3}}, {{%r4,%r4,%r4,%r4}}, {{%r4,%r4}}, {{%f0,%f0,%f0,%f0}};\n"
    statistics = run(body, block=64, grid=2)[-1]
    assert statistics["flops"] == {"mma.f32.bf16": 4 * 2 * 16 * 8 * 16}


def test_a_failed_launch_leaves_the_module_as_it_was():
    m = module(entry("setp.eq.u32 %p0, %r0, 3;\n@%p0 trap;", "bad", 1), entry("", "good", 1))
    for _ in range(2):
        with pytest.raises(VMError, match="trap"):
            m.launch("bad", 1, 32, args=[None])
        assert m.launch("good", 1, 32, args=[None])["blocks"] == 1

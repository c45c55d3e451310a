"""Loads and stores of every width and space, address conversion, and what stops them."""

import numpy as np
import pytest

from python_tests.ptx.support import HEADER, POISON, entry, run
from python_tests.support.ptx import Module, VMError

WORDS = np.random.default_rng(3).integers(0, 1 << 32, 128).astype(np.uint32)


@pytest.mark.parametrize("space", ["global", "shared", "local", "generic"])
@pytest.mark.parametrize("vector", [1, 2, 4])
@pytest.mark.parametrize(
    "kind, register", [("b8", "%h"), ("b16", "%h"), ("b32", "%r"), ("b64", "%q")]
)
def test_round_trip(kind, register, vector, space):
    size = int(kind[1:]) // 8 * vector
    if size > 16:
        pytest.skip("no access has more than 16 bytes")
    names = ", ".join(f"{register}{i}" for i in range(20, 20 + vector))
    if register == "%h":
        names = ", ".join(f"%h{i}" for i in range(vector))
    names = f"{{{names}}}" if vector > 1 else names
    suffix = f".v{vector}.{kind}" if vector > 1 else f".{kind}"
    place = {"shared": "sm", "local": "mine", "generic": "sm", "global": "sm"}[space]
    address = f"mov.u32 %r4, {place};\nmad.lo.u32 %r4, %r0, {size}, %r4;"
    if space == "local":
        address = "mov.u32 %r4, mine;"
    pointer, mode = "%r4", f".{space}"
    if space == "generic":
        address += "\ncvt.u64.u32 %q12, %r4;\ncvta.shared.u64 %q12, %q12;"
        pointer, mode = "%q12", ""
    if space == "global":
        address, pointer = f"mad.wide.u32 %q12, %r0, {size}, %q2;", "%q12"
    body = f"""
    .shared .align 16 .b8 sm[512];
    .local .align 16 .b8 mine[16];
    mad.wide.u32 %q10, %r0, {size}, %q0;
    mad.wide.u32 %q11, %r0, {size}, %q1;
    {address}
    ld.global{suffix} {names}, [%q10];
    st{mode}{suffix} [{pointer}], {names};
    ld{mode}{suffix} {names}, [{pointer}];
    st.global{suffix} [%q11], {names};"""
    source, copy, *_ = run(body, WORDS, np.zeros_like(WORDS), np.zeros_like(WORDS))
    count = 32 * size // 4
    np.testing.assert_array_equal(copy[:count], source[:count])
    assert not copy[count:].any()


@pytest.mark.parametrize("kind, expected", [("s8", -1), ("u8", 255), ("s16", -2), ("u16", 65534)])
def test_narrow_loads_extend(kind, expected):
    body = f"""
    ld.global.{kind} %r5, [%q0];
    st.global.u32 [%q1], %r5;"""
    bits = np.array([expected & ((1 << int(kind[1:])) - 1)], np.uint32)
    _, out, _ = run(body, bits, np.zeros(1, np.int32), block=1)
    assert out[0] == expected


def test_constant_and_module_variables():
    text = f"""{HEADER}
    .const .align 4 .u32 table[4] = {{10, 20, 30, 40}};
    .global .align 4 .u32 counter[2] = {{7, 8}};
    """ + entry(
        """
    mov.u64 %q10, table;
    and.b32 %r4, %r0, 3;
    mad.wide.u32 %q10, %r4, 4, %q10;
    ld.const.u32 %r5, [%q10];
    ld.global.u32 %r6, [counter+4];
    add.u32 %r5, %r5, %r6;
    add.u64 %q11, %q0, %q8;
    st.global.u32 [%q11], %r5;
    st.global.u32 [counter], 99;""",
        parameters=1,
    )
    m = Module(text)
    out = m.alloc(np.zeros(32, np.uint32))
    m.launch("k", 1, 32, args=[out])
    np.testing.assert_array_equal(out, (np.arange(32) % 4 + 1) * 10 + 8)
    assert m.variable("counter", np.uint32)[0] == 99


def test_registers_and_shared_memory_begin_as_poison():
    body = """
    .shared .align 4 .u32 sm[4];
    ld.shared.u32 %r5, [sm+4];
    st.global.u32 [%q0], %r5;
    st.global.u32 [%q0+4], %r6;"""
    out, _ = run(body, np.zeros(2, np.uint32), block=1)
    assert list(out) == [POISON, POISON]


def test_isspacep_and_cvta():
    body = """
    .shared .align 4 .b8 sm[64];
    .local .align 4 .b8 mine[16];
    mov.u64 %q10, sm;
    cvta.shared.u64 %q11, %q10;
    mov.u64 %q12, mine;
    cvta.local.u64 %q13, %q12;
    isspacep.shared %p1, %q11;
    isspacep.global %p2, %q0;
    isspacep.local %p3, %q13;
    isspacep.global %p4, %q11;
    isspacep.shared %p5, %q13;
    selp.u32 %r5, 1, 0, %p1;
    selp.u32 %r6, 2, 0, %p2;
    selp.u32 %r7, 4, 0, %p3;
    selp.u32 %r8, 8, 0, %p4;
    selp.u32 %r9, 16, 0, %p5;
    add.u32 %r5, %r5, %r6;
    add.u32 %r7, %r7, %r8;
    add.u32 %r5, %r5, %r7;
    add.u32 %r5, %r5, %r9;
    st.global.u32 [%q0], %r5;
    cvta.to.shared.u64 %q14, %q11;
    sub.u64 %q14, %q14, %q10;
    st.global.u32 [%q0+4], %q14;
    cvta.to.local.u64 %q15, %q13;
    sub.u64 %q15, %q15, %q12;
    st.global.u32 [%q0+8], %q15;"""
    out, _ = run(body, np.ones(3, np.uint32), block=1)
    assert list(out) == [7, 0, 0]


STOPS = {
    "beyond the buffer": ("st.global.u32 [%q0+128], %r0;", "outside every registered buffer"),
    "before the buffer": ("ld.global.u32 %r5, [%q0+-4];", "4 bytes before buffer p0"),
    "null": ("mov.u64 %q10, 0;\nld.global.u32 %r5, [%q10];", "NULL pointer"),
    "misaligned global": ("ld.global.u32 %r5, [%q0+2];", "misaligned global access of 4 bytes"),
    "vector misaligned": ("ld.global.v4.u32 {%r5,%r6,%r7,%r8}, [%q0+8];", "misaligned"),
    "beyond shared": ("st.shared.u32 [sm+64], %r0;", "outside the block's 64 bytes"),
    "before shared": ("ld.shared.u32 %r5, [sm+-4];", "offset -4 is outside"),
    "misaligned shared": ("ld.shared.u64 %q10, [sm+4];", "misaligned shared access of 8 bytes"),
    "beyond local": ("st.local.u32 [mine+16], %r0;", "local access outside the thread's 16 bytes"),
    "to constants": ("st.global.u32 [c], %r0;", "read-only buffer variable c"),
}


@pytest.mark.parametrize("what", STOPS)
def test_bad_access_stops(what):
    instruction, message = STOPS[what]
    body = f"""
    .shared .align 16 .b8 sm[64];
    .local .align 16 .b8 mine[16];
    {instruction}"""
    with pytest.raises(VMError, match=message):
        run(body, np.zeros(32, np.uint32), block=1, declarations=".const .align 4 .u32 c = 1;\n")


def test_the_message_names_kernel_thread_line_and_instruction():
    body = "setp.eq.u32 %p1, %r0, 37;\n@%p1 st.global.u32 [%q0+4], %r0;"
    with pytest.raises(VMError, match=r"kernel k, block \(0,0,0\), thread \(37,0,0\), PTX line"):
        run(body, np.zeros(1, np.uint32), block=64)
    with pytest.raises(VMError, match=r"st\.global\.u32 \[%q0\+4\], %r0"):
        run(body, np.zeros(1, np.uint32), block=64)


def test_store_to_a_read_only_buffer_stops():
    m = Module(HEADER + entry("st.global.u32 [%q0], %r0;", parameters=1))
    a = m.alloc(np.zeros(4, np.uint32), "weights", readonly=True)
    with pytest.raises(VMError, match="write to read-only buffer weights"):
        m.launch("k", 1, 1, args=[a])


@pytest.mark.parametrize("seed", [0, 1])
def test_of_colliding_stores_the_seed_picks_the_lane(seed):
    """Odd seeds go through the lanes backwards, so that nobody relies on the last one winning."""
    out, _ = run("st.global.u32 [%q0], %r0;", np.zeros(1, np.uint32), seed=seed)
    assert out[0] == (0 if seed else 31)


def test_sectors_are_counted():
    body = """
    mul.wide.u32 %q10, %r0, {stride};
    add.u64 %q10, %q10, %q0;
    ld.global.u32 %r5, [%q10];"""
    for stride, sectors in ((4, 4), (8, 8), (32, 32), (0, 1)):
        *_, st = run(body.format(stride=stride), np.zeros(256, np.uint32))
        assert st["global_load"]["sectors"] == sectors
        assert st["global_load"]["requests"] == 1


def test_bank_conflicts_are_counted():
    body = """
    .shared .align 16 .b8 sm[4096];
    mov.u32 %r4, sm;
    mad.lo.u32 %r4, %r0, {stride}, %r4;
    ld.shared.u32 %r5, [%r4];"""
    for stride, waves in ((4, 1), (8, 2), (128, 32), (0, 1), (132 - 128, 1)):
        *_, st = run(body.format(stride=stride), np.zeros(1, np.uint32))
        assert st["shared"]["wavefronts"] == waves

"""atom and red on global and shared memory, integers and floats, single and vectors."""

import numpy as np
import pytest

from python_tests.ptx.support import run
from python_tests.support.ptx import bf16, from_bf16

VALUES = np.random.default_rng(5).integers(0, 1 << 32, 64).astype(np.uint32)


def wrapping(kind, f):
    def apply(values, start):
        with np.errstate(over="ignore"):
            result = kind(start)
            for v in values.view(kind):
                result = f(result, v)
        return result

    return apply


REDUCTIONS = {
    "add.u32": wrapping(np.uint32, lambda a, b: np.uint32(a + b)),
    "min.u32": wrapping(np.uint32, min),
    "max.u32": wrapping(np.uint32, max),
    "min.s32": wrapping(np.int32, min),
    "max.s32": wrapping(np.int32, max),
    "and.b32": wrapping(np.uint32, lambda a, b: a & b),
    "or.b32": wrapping(np.uint32, lambda a, b: a | b),
    "xor.b32": wrapping(np.uint32, lambda a, b: a ^ b),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("instruction", ["atom", "red"])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_integer_reduction(name, instruction, space, seed):
    target = "%q1" if space == "global" else "sm"
    old = "%r6, " if instruction == "atom" else ""
    body = f"""
    .shared .align 4 .u32 sm;
    add.u64 %q10, %q0, %q8;
    ld.global.u32 %r4, [%q10];
    ld.global.u32 %r5, [%q1];
    st.shared.u32 [sm], %r5;
    bar.sync 0;
    {instruction}.{space}.{name} {old}[{target}], %r4;
    bar.sync 0;
    ld.{space}.u32 %r7, [{target}];
    st.global.u32 [%q1], %r7;"""
    _, out, _ = run(body, VALUES, np.array([12345], np.uint32), block=64, seed=seed)
    expected = REDUCTIONS[name](VALUES, 12345)
    assert out.view(type(expected))[0] == expected


def test_atom_returns_what_was_there():
    body = """
    atom.global.add.u32 %r5, [%q0], 3;
    add.u64 %q10, %q1, %q8;
    st.global.u32 [%q10], %r5;"""
    total, old, _ = run(body, np.zeros(1, np.uint32), np.zeros(64, np.uint32), block=64, seed=3)
    assert total[0] == 64 * 3
    np.testing.assert_array_equal(np.sort(old), 3 * np.arange(64))


def test_inc_and_dec_wrap():
    body = """
    atom.global.inc.u32 %r5, [%q0], 9;
    atom.global.dec.u32 %r6, [%q1], 9;"""
    up, down, _ = run(body, np.zeros(1, np.uint32), np.zeros(1, np.uint32), block=64)
    assert up[0] == 64 % 10 and down[0] == -64 % 10


@pytest.mark.parametrize("bits", [32, 64])
def test_exchange_and_compare_and_swap(bits):
    r = "%r5" if bits == 32 else "%q10"
    body = f"""
    atom.global.exch.b{bits} {r}, [%q0], 42;
    st.global.b{bits} [%q0+16], {r};
    atom.global.cas.b{bits} {r}, [%q0], 41, 43;
    atom.global.cas.b{bits} {r}, [%q0], 42, 44;
    st.global.b{bits} [%q0+32], {r};"""
    kind = np.uint32 if bits == 32 else np.uint64
    out, _ = run(body, np.full(8 * 8 // (bits // 8), 7, kind), block=1)
    assert out[0] == 44 and out[16 * 8 // bits] == 7 and out[32 * 8 // bits] == 42


def test_b128_exchange_and_compare_and_swap():
    body = """
    .reg .b128 %w<4>;
    mov.b128 %w0, {%q8, %q8};
    mov.u64 %q12, 5;
    mov.b128 %w1, {%q12, %q12};
    atom.global.exch.b128 %w2, [%q0], %w1;
    mov.b128 {%q10, %q11}, %w2;
    st.global.v2.b64 [%q0+16], {%q10, %q11};
    atom.global.cas.b128 %w2, [%q0], %w1, %w0;"""
    out, _ = run(body, np.array([1, 2, 0, 0], np.uint64), block=1)
    assert list(out) == [0, 0, 1, 2]


def test_float_additions():
    body = """
    cvt.rn.f32.u32 %f1, %r0;
    red.global.add.f32 [%q0], %f1;
    cvt.f64.f32 %d1, %f1;
    red.global.add.f64 [%q1], %d1;
    mov.b32 %r4, 0x3c004000;
    red.global.add.noftz.f16x2 [%q2], %r4;
    mov.b32 %r5, 0x3f804000;
    red.global.add.noftz.bf16x2 [%q3], %r5;"""
    f, d, h, b, _ = run(
        body,
        np.zeros(1, np.float32),
        np.zeros(1, np.float64),
        np.zeros(2, np.float16),
        np.zeros(2, np.uint16),
        block=64,
    )
    total = 64 * 63 / 2
    assert f[0] == total and d[0] == total
    np.testing.assert_array_equal(h, [128, 64])
    np.testing.assert_array_equal(from_bf16(b), [128, 64])


def test_half_minimum_and_maximum():
    body = """
    mov.b32 %r4, 0xc0003c00;
    red.global.min.noftz.f16x2 [%q0], %r4;
    mov.b32 %r5, 0x40003f80;
    red.global.max.noftz.bf16x2 [%q1], %r5;"""
    low, high, _ = run(body, np.array([5, 5], np.float16), bf16([0, 7]), block=1)
    np.testing.assert_array_equal(low, [1, -2])
    np.testing.assert_array_equal(from_bf16(high), [1, 7])


def test_vector_reduction():
    body = """
    mov.f32 %f1, 0f3F800000;
    mov.f32 %f2, 0f40000000;
    red.global.add.v2.f32 [%q0], {%f1, %f2};"""
    out, _ = run(body, np.zeros(2, np.float32))
    np.testing.assert_array_equal(out, [32, 64])

"""mma.sync and wmma: fragments by the layout tables of the PTX manual, small integers, exact."""

import numpy as np
import pytest
import torch

from python_tests.ptx.support import run
from python_tests.support.ptx import bf16

RNG = np.random.default_rng(11)
BITS = {
    "f16": 16,
    "bf16": 16,
    "tf32": 32,
    "f64": 64,
    "s8": 8,
    "u8": 8,
    "s4": 4,
    "e4m3": 8,
    "e5m2": 8,
}


def encode(x, kind):
    """Bits of a small integer."""
    x = np.asarray(x)
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    if kind == "bf16":
        return bf16(x)
    if kind in ("tf32", "f32"):
        return x.astype(np.float32).view(np.uint32)
    if kind == "f64":
        return x.astype(np.float64).view(np.uint64)
    if kind in ("e4m3", "e5m2"):
        dtype = torch.float8_e4m3fn if kind == "e4m3" else torch.float8_e5m2
        return torch.from_numpy(x.astype(np.float32)).to(dtype).view(torch.uint8).numpy()
    return x & ((1 << min(BITS.get(kind, 32), 32)) - 1)


def a_place(lane, i, kind, m):
    """Row and column of element i of A: the figures of the section on matrix fragments."""
    group, thread = lane // 4, lane % 4
    if m == 8:
        per = 32 // min(BITS[kind], 32)
        return group, thread * per + i
    if BITS[kind] == 16:
        row = group if i in (0, 1, 4, 5) else group + 8
        return row, thread * 2 + i % 2 + (8 if i >= 4 else 0)
    if BITS[kind] == 8:
        row = group if i < 4 or 8 <= i < 12 else group + 8
        return row, thread * 4 + i % 4 + (16 if i >= 8 else 0)
    if BITS[kind] == 4:
        row = group if i < 8 or 16 <= i < 24 else group + 8
        return row, thread * 8 + i % 8 + (32 if i >= 16 else 0)
    return group + 8 * (i % 2), thread + 4 * (i // 2)


def b_place(lane, i, kind):
    per = max(1, 32 // BITS[kind])
    return lane % 4 * per + i % per + i // per * 4 * per, lane // 4


def c_place(lane, i):
    return lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2


def pack(matrix, place, count, kind):
    """Registers of every lane."""
    bits = BITS.get(kind, 32)
    per = max(1, 32 // bits)
    codes = encode(matrix, kind)
    dtype = np.uint64 if bits == 64 else np.uint32
    out = np.zeros((32, count // per), dtype)
    for lane in range(32):
        for i in range(count):
            out[lane, i // per] |= dtype(int(codes[place(lane, i)]) << i % per * bits)
    return out


SHAPES = [
    ("m16n8k8", "bf16", "f32"),
    ("m16n8k16", "bf16", "f32"),
    ("m16n8k8", "f16", "f32"),
    ("m16n8k16", "f16", "f32"),
    ("m16n8k8", "f16", "f16"),
    ("m16n8k16", "f16", "f16"),
    ("m16n8k4", "tf32", "f32"),
    ("m16n8k8", "tf32", "f32"),
    ("m8n8k16", "s8", "s32"),
    ("m16n8k16", "s8", "s32"),
    ("m16n8k32", "s8", "s32"),
    ("m16n8k32", "u8", "s32"),
    ("m16n8k64", "s4", "s32"),
    ("m8n8k4", "f64", "f64"),
    ("m16n8k8", "f64", "f64"),
    ("m16n8k32", "e4m3", "f32"),
    ("m16n8k32", "e5m2", "f32"),
]


def numbers(shape):
    return tuple(int(x) for x in shape[1:].replace("n", " ").replace("k", " ").split())


def small(kind, shape):
    low, high = {"u8": (0, 9), "s4": (-8, 8), "e5m2": (-4, 5)}.get(kind, (-8, 9))
    return RNG.integers(low, high, shape)


def vector(prefix, count):
    return "{" + ", ".join(f"{prefix}{i}" for i in range(count)) + "}"


def multiply(shape, kind, out_kind, a, b, c, suffix=""):
    m, n, k = numbers(shape)
    fa = pack(a, lambda lane, i: a_place(lane, i, kind, m), m * k // 32, kind)
    fb = pack(b, lambda lane, i: b_place(lane, i, kind), n * k // 32, kind)
    fc = pack(c, c_place, m * n // 32, out_kind)
    wide = BITS[kind] == 64
    register, size = ("f64", 8) if wide else ("b32", 4)
    text = ""
    for name, values, pointer in (("%a", fa, 0), ("%b", fb, 1), ("%c", fc, 2)):
        text += f".reg .{register} {name}<{values.shape[1]}>;\n"
        text += f"mad.wide.u32 %q10, %r1, {values.shape[1] * size}, %q{pointer};\n"
        for i in range(values.shape[1]):
            text += f"ld.global.{register} {name}{i}, [%q10+{i * size}];\n"
    counts = [v.shape[1] for v in (fc, fa, fb, fc)]
    operands = ", ".join(
        vector(x, count) if count > 1 else f"{x}0"
        for x, count in zip(("%c", "%a", "%b", "%c"), counts, strict=True)
    )
    types = f"{out_kind}.{kind}.{kind}.{out_kind}"
    text += f"mma.sync.aligned.{shape}.row.col{suffix}.{types} {operands};\n"
    text += f"mad.wide.u32 %q10, %r1, {fc.shape[1] * size}, %q2;\n"
    for i in range(fc.shape[1]):
        text += f"st.global.{register} [%q10+{i * size}], %c{i};\n"
    _, _, out, _ = run(text, fa, fb, fc)
    return unpack(out, out_kind, m, n)


def unpack(registers, kind, m, n):
    values = registers.view(
        {"f32": np.float32, "f16": np.float16, "s32": np.int32}.get(kind, float)
    )
    out = np.zeros((m, n))
    for lane in range(32):
        for i in range(m * n // 32):
            out[c_place(lane, i)] = values[lane, i]
    return out


@pytest.mark.parametrize("shape, kind, out_kind", SHAPES)
def test_mma(shape, kind, out_kind):
    m, n, k = numbers(shape)
    a, b, c = small(kind, (m, k)), small(kind, (k, n)), RNG.integers(-50, 50, (m, n))
    np.testing.assert_array_equal(multiply(shape, kind, out_kind, a, b, c), a @ b + c)


def test_satfinite_of_integers():
    a, b = np.full((16, 32), 127), np.full((32, 8), 127)
    c = np.full((16, 8), 2**31 - 1000)
    total = a @ b + c
    saturated = multiply("m16n8k32", "s8", "s32", a, b, c, ".satfinite")
    np.testing.assert_array_equal(saturated, 2**31 - 1)
    np.testing.assert_array_equal(multiply("m16n8k32", "s8", "s32", a, b, c), total - 2**32)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_a_sum_is_rounded_once(kind):
    """Terms that would vanish one by one add up before the sum is rounded."""
    a, b = np.ones((16, 16)), np.full((16, 8), 2.0**-20)
    c = np.ones((16, 8)) * 2**4
    b[0] = 1
    got = multiply("m16n8k16", kind, "f32", a, b, c)
    b_exact = {"bf16": b, "f16": b.astype(np.float16).astype(float)}[kind]
    expected = (a @ b_exact + c).astype(np.float32)
    np.testing.assert_array_equal(got, expected)


def test_tf32_is_truncated():
    a, b, c = np.zeros((16, 8)), np.zeros((8, 8)), np.zeros((16, 8))
    a[:, 0], b[0] = 1 + 2.0**-11, 1
    assert (multiply("m16n8k8", "tf32", "f32", a, b, c) == 1).all()


@pytest.mark.parametrize("a_layout", ["row", "col"])
@pytest.mark.parametrize("b_layout", ["row", "col"])
def test_wmma(a_layout, b_layout):
    a, b = small("f16", (16, 16)), small("f16", (16, 16))
    c = RNG.integers(-50, 50, (16, 16)).astype(np.float32)
    fa, fb = vector("%x", 8), vector("%y", 8)
    fc = vector("%f", 8)
    text = f"""
    .reg .b32 %x<8>; .reg .b32 %y<8>;
    wmma.load.a.sync.aligned.{a_layout}.m16n16k16.global.f16 {fa}, [%q0], 16;
    wmma.load.b.sync.aligned.{b_layout}.m16n16k16.global.f16 {fb}, [%q1], 16;
    wmma.load.c.sync.aligned.row.m16n16k16.global.f32 {fc}, [%q2], 16;
    wmma.mma.sync.aligned.{a_layout}.{b_layout}.m16n16k16.f32.f32 {fc}, {fa}, {fb}, {fc};
    wmma.store.d.sync.aligned.row.m16n16k16.global.f32 [%q2], {fc}, 16;"""
    stored_a = (a.T if a_layout == "col" else a).astype(np.float16)
    stored_b = (b.T if b_layout == "col" else b).astype(np.float16)
    _, _, out, _ = run(text, stored_a, stored_b, c)
    np.testing.assert_array_equal(out, a @ b + c)

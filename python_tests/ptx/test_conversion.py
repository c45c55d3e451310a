"""cvt between all integers and formats, in every rounding mode; packed conversions."""

import math
from fractions import Fraction

import pytest

from python_tests.ptx.formats import (
    BF16,
    BY_NAME,
    E4M3,
    E5M2,
    F16,
    F32,
    F64,
    MODES,
    NAN,
    TF32,
    convert,
)
from python_tests.ptx.support import Form, check, sign_extended

INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
FLOATS = {"f16": ("b16", F16), "bf16": ("b16", BF16), "f32": ("f32", F32), "f64": ("f64", F64)}
TO_INTEGER = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


def width(integer):
    return int(integer[1:])


def register(integer):
    return f"b{max(width(integer), 16)}"  # 8-bit integers travel in 16-bit registers


def span(integer):
    bits = width(integer)
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if integer[0] == "s" else (0, (1 << bits) - 1)


def value_of(bits, integer):
    if integer[0] == "s":
        return sign_extended(bits, width(integer))
    return bits & ((1 << width(integer)) - 1)


def clamp(x, integer):
    low, high = span(integer)
    return max(low, min(high, x))


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("destination", INTEGERS)
def test_integer_to_integer(destination, source):
    to, of = register(destination), (register(source),)
    check(
        Form(
            f"cvt.{destination}.{source}",
            to,
            of,
            lambda a: value_of(value_of(a, source), destination),
        )
    )
    check(
        Form(
            f"cvt.sat.{destination}.{source}",
            to,
            of,
            lambda a: clamp(value_of(a, source), destination),
        )
    )


@pytest.mark.parametrize("mode", TO_INTEGER)
@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("destination", INTEGERS)
def test_float_to_integer(destination, source, mode):
    """Out of range goes to the end of the range; NaN to 0, or 0x80.. where 64 bits take part."""
    of, f = FLOATS[source]

    def reference(a):
        x = f.number(a)
        if math.isnan(x):
            highest_bit = value_of(1 << width(destination) - 1, destination)
            return highest_bit if width(destination) == 64 or source == "f64" else 0
        if math.isinf(x):
            return span(destination)[x > 0]
        return clamp(TO_INTEGER[mode](x), destination)

    kind = f"{source}:wide"
    check(
        Form(f"cvt.{mode}.{destination}.{source}", register(destination), (of,), reference, (kind,))
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("destination", FLOATS)
def test_integer_to_float(destination, source, mode):
    to, f = FLOATS[destination]
    check(
        Form(
            f"cvt.{mode}.{destination}.{source}",
            to,
            (register(source),),
            lambda a: f.encode(Fraction(value_of(a, source)), mode),
            format=destination,
        )
    )


NARROWING = [("f32", "f16"), ("f32", "bf16"), ("f64", "f32"), ("f64", "f16"), ("f64", "bf16")]
WIDENING = [("f16", "f32"), ("bf16", "f32"), ("f32", "f64"), ("f16", "f64"), ("bf16", "f64")]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source, destination", NARROWING)
def test_float_to_narrower_float(source, destination, mode):
    (of, f), (to, g) = FLOATS[source], FLOATS[destination]
    check(
        Form(
            f"cvt.{mode}.{destination}.{source}",
            to,
            (of,),
            convert(f, g, mode),
            (source,),
            destination,
        )
    )


@pytest.mark.parametrize("source, destination", WIDENING)
def test_float_to_wider_float(source, destination):
    (of, f), (to, g) = FLOATS[source], FLOATS[destination]
    check(Form(f"cvt.{destination}.{source}", to, (of,), convert(f, g), (source,), destination))


@pytest.mark.parametrize("mode", TO_INTEGER)
def test_float_to_integral_float(mode):
    def reference(a):
        x = F32.number(a)
        if math.isnan(x):
            return NAN
        if math.isinf(x):
            return a
        return F32.encode(Fraction(TO_INTEGER[mode](x)), negative_zero=F32.is_negative(a))

    check(Form(f"cvt.{mode}.f32.f32", "f32", ("f32",), reference, ("f32",), "f32"))


def test_saturation_to_the_unit_interval():
    def reference(a):
        x = F32.number(a)
        return 0 if not x > 0 else 0x3F800000 if x > 1 else a

    check(Form("cvt.sat.f32.f32", "f32", ("f32",), reference, ("f32",)))


def test_tf32_lies_in_the_upper_bits():
    def reference(a):
        bits = convert(F32, TF32, "rna")(a)
        return bits if bits == NAN else bits << 13

    check(Form("cvt.rna.tf32.f32", "b32", ("f32",), reference, ("f32",), "f32"))


def test_relu_of_a_single_conversion():
    reference = convert(F32, BF16, relu=True)
    check(Form("cvt.rn.relu.bf16.f32", "b16", ("f32",), reference, ("f32",), "bf16"))


@pytest.mark.parametrize("relu", ["", ".relu"])
@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("destination", ["f16", "bf16"])
def test_two_floats_to_packed_halves(destination, mode, relu):
    """The first operand becomes the upper half."""
    one = convert(F32, BY_NAME[destination], mode, relu=bool(relu))
    check(
        Form(
            f"cvt.{mode}{relu}.{destination}x2.f32",
            "b32",
            ("f32", "f32"),
            lambda a, b: [one(b), one(a)],
            ("f32", "f32"),
            destination,
            packed=2,
        )
    )


@pytest.mark.parametrize("relu", ["", ".relu"])
@pytest.mark.parametrize("name, f", [("e4m3", E4M3), ("e5m2", E5M2)])
def test_packed_fp8(name, f, relu):
    of_f32 = convert(F32, f, saturate=True, relu=bool(relu))
    of_f16 = convert(F16, f, saturate=True, relu=bool(relu))
    to_f16 = convert(f, F16, relu=bool(relu))
    check(
        Form(
            f"cvt.rn.satfinite{relu}.{name}x2.f32",
            "b16",
            ("f32", "f32"),
            lambda a, b: [of_f32(b), of_f32(a)],
            ("f32:wide", "f32"),
            name,
            packed=2,
        )
    )
    check(
        Form(
            f"cvt.rn.satfinite{relu}.{name}x2.f16x2",
            "b16",
            ("b32",),
            lambda a: [of_f16(a & 0xFFFF), of_f16(a >> 16)],
            ("f16:pair",),
            name,
            packed=2,
        )
    )
    check(
        Form(
            f"cvt.rn{relu}.f16x2.{name}x2",
            "b32",
            ("b16",),
            lambda a: [to_f16(a & 0xFF), to_f16(a >> 8)],
            format="f16",
            packed=2,
        )
    )


def test_pack_of_saturated_integers():
    def signed(a):
        return sign_extended(a, 32)

    check(
        Form(
            "cvt.pack.sat.s8.s32.b32",
            "b32",
            ("b32", "b32", "b32"),
            lambda a, b, c: (
                (c & 0xFFFF) << 16
                | (clamp(signed(a), "s8") & 255) << 8
                | clamp(signed(b), "s8") & 255
            ),
        )
    )
    check(
        Form(
            "cvt.pack.sat.u16.s32",
            "b32",
            ("b32", "b32"),
            lambda a, b: clamp(signed(a), "u16") << 16 | clamp(signed(b), "u16"),
        )
    )

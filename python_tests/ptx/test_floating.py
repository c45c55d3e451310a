"""Arithmetic on f32 and f64: rounded as exact rational arithmetic says, in all four modes."""

import math

import numpy as np
import pytest

from python_tests.ptx.formats import F32, F64, MODES, NAN, arithmetic
from python_tests.ptx.support import Form, check, results

ONE = {"f32": 0x3F800000, "f64": 0x3FF0000000000000}
FORMATS = {"f32": F32, "f64": F64}


def extreme(largest, f, nan_wins=False):
    """min or max: a NaN gives way to a number unless .NaN says otherwise; -0 is less than +0."""

    def reference(a, b):
        if f.is_nan(a) or f.is_nan(b):
            if nan_wins or (f.is_nan(a) and f.is_nan(b)):
                return NAN
            return b if f.is_nan(a) else a

        def key(v):
            return (f.number(v), not f.is_negative(v))

        return max(a, b, key=key) if largest else min(a, b, key=key)

    return reference


def square_root(f):
    kind, bits = (np.float32, np.uint32) if f is F32 else (np.float64, np.uint64)

    def reference(a):
        x = f.number(a)
        if math.isnan(x) or x < 0:
            return NAN
        return a if x == 0 else int(np.sqrt(kind(x)).view(bits))

    return reference


def flushed(reference):
    """.ftz: denormal operands and results become zeros of their sign."""

    def flush(bits):
        return bits if isinstance(bits, str) or bits & F32.infinity else bits & F32.sign

    return lambda *a: flush(reference(*[flush(x) for x in a]))


def saturating(reference):
    """.sat: into [0, 1], a NaN to 0."""

    def clamp(*a):
        bits = reference(*a)
        if bits == NAN or F32.number(bits) <= 0:
            return 0
        return min(bits, ONE["f32"])

    return clamp


def exact_forms():
    forms = []
    for name, f in FORMATS.items():
        two, three = (name,) * 2, (name,) * 3

        def form(instruction, sources, reference, name=name):
            return Form(instruction, name, sources, reference, sources, format=name)

        for mode in MODES:
            forms += [
                form(f"{op}.{mode}.{name}", two, arithmetic(op, f, mode))
                for op in ("add", "sub", "mul", "div")
            ]
            forms.append(form(f"fma.{mode}.{name}", three, arithmetic("fma", f, mode)))
            forms.append(
                form(
                    f"rcp.{mode}.{name}",
                    (name,),
                    lambda a, f=f, n=name, m=mode: arithmetic("div", f, m)(ONE[n], a),
                )
            )
        forms += [
            form(f"neg.{name}", (name,), lambda a, f=f: a ^ f.sign),
            form(f"abs.{name}", (name,), lambda a, f=f: a & ~f.sign),
            form(f"min.{name}", two, extreme(False, f)),
            form(f"max.{name}", two, extreme(True, f)),
            form(f"sqrt.rn.{name}", (name,), square_root(f)),
            form(
                f"copysign.{name}", two, lambda a, b, f=f: NAN if f.is_nan(b) else sign_of(a, b, f)
            ),
        ]
    f32 = ("f32",)
    forms += [
        Form("max.NaN.f32", "f32", f32 * 2, extreme(True, F32, True), f32 * 2, "f32"),
        Form("min.NaN.f32", "f32", f32 * 2, extreme(False, F32, True), f32 * 2, "f32"),
        Form("min.f32 of three", "f32", f32 * 3, minimum_of_three, f32 * 3, "f32", text=MIN3),
    ]
    for op, count in (("add", 2), ("mul", 2), ("fma", 3)):
        reference = arithmetic(op, F32)
        kinds = f32 * count
        forms += [
            Form(f"{op}.rn.ftz.f32", "f32", kinds, flushed(reference), kinds, "f32"),
            Form(f"{op}.rn.sat.f32", "f32", kinds, saturating(reference), kinds, "f32"),
        ]
    for op, count in (("add", 2), ("sub", 2), ("mul", 2), ("fma", 3)):
        reference = arithmetic(op, F32)

        def halves(*a, reference=reference):
            return [reference(*[x >> 32 * i & 0xFFFFFFFF for x in a]) for i in range(2)]

        kinds = ("b64",) * count
        forms.append(Form(f"{op}.rn.f32x2", "b64", kinds, halves, format="f32", packed=2))
    return forms


MIN3 = "min.f32 %x, %a, %b, %c;"


def minimum_of_three(a, b, c):
    smallest = extreme(False, F32)
    first = smallest(a, b)
    return smallest(F32.sign - 1 if first == NAN else first, c)


def sign_of(a, b, f):
    return b & ~f.sign | a & f.sign


@pytest.mark.parametrize("form", exact_forms(), ids=repr)
def test_exact_instruction(form):
    check(form)


CLASSES = {
    "finite": math.isfinite,
    "infinite": math.isinf,
    "number": lambda x: not math.isnan(x),
    "notanumber": math.isnan,
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", [*CLASSES, "normal", "subnormal"])
def test_testp(kind, name):
    f = FORMATS[name]
    least = 2.0 ** (1 - f.bias)

    def reference(a):
        x = f.number(a)
        if kind in CLASSES:
            return CLASSES[kind](x)
        normal = math.isfinite(x) and abs(x) >= least
        return normal if kind == "normal" else x != 0 and abs(x) < least

    check(Form(f"testp.{kind}.{name}", "pred", (name,), reference, (name,)))


APPROXIMATE = {
    "rcp": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@pytest.mark.parametrize("operation", APPROXIMATE)
def test_approximation_is_the_rounded_exact_value(operation):
    """The interpreter computes in float64 and rounds; hardware is less exact, never more."""
    x = np.random.default_rng(1).standard_normal(512).astype(np.float32) * np.float32(3)
    x[:3] = [0.0, -0.0, 1.0]
    form = Form(f"{operation}.approx.f32", "f32", ("f32",), None)
    got = np.array(results(form, [x.view(np.uint32).astype(np.uint64)]), np.uint32)
    with np.errstate(all="ignore"):
        expected = APPROXIMATE[operation](x.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_max_ulp(got.view(np.float32), expected, maxulp=1)

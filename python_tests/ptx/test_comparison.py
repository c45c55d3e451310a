"""setp, set, selp, slct and the combination with a predicate."""

import operator

import pytest

from python_tests.ptx.formats import BF16, F16, F32, F64
from python_tests.ptx.support import Form, check, sign_extended

ORDER = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
UNSIGNED = {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}
FLOATS = {"f16": (F16, "b16"), "bf16": (BF16, "b16"), "f32": (F32, "f32"), "f64": (F64, "f64")}
EQUAL_OFTEN = ("small", "small")


def integer_forms():
    for bits in (16, 32, 64):
        pair = (f"b{bits}",) * 2
        for name, f in ORDER.items():
            yield Form(f"setp.{name}.u{bits}", "pred", pair, f, EQUAL_OFTEN)
            yield Form(
                f"setp.{name}.s{bits}",
                "pred",
                pair,
                lambda a, b, f=f, n=bits: f(sign_extended(a, n), sign_extended(b, n)),
                EQUAL_OFTEN,
            )
        for name, f in UNSIGNED.items():
            yield Form(f"setp.{name}.u{bits}", "pred", pair, f, EQUAL_OFTEN)


def float_forms():
    for name, (f, register) in FLOATS.items():

        def form(comparison, reference, name=name, register=register):
            return Form(
                f"setp.{comparison}.{name}", "pred", (register,) * 2, reference, (name, name)
            )

        def unordered(a, b, f=f):
            return f.is_nan(a) or f.is_nan(b)

        for comparison, test in ORDER.items():
            yield form(
                comparison,
                lambda a, b, t=test, f=f, u=unordered: not u(a, b) and t(f.number(a), f.number(b)),
            )
            yield form(
                comparison + "u",
                lambda a, b, t=test, f=f, u=unordered: u(a, b) or t(f.number(a), f.number(b)),
            )
        yield form("num", lambda a, b, u=unordered: not u(a, b))
        yield form("nan", unordered)


@pytest.mark.parametrize("form", [*integer_forms(), *float_forms()], ids=repr)
def test_setp(form):
    check(form)


ONES = {"u32": 0xFFFFFFFF, "s32": 0xFFFFFFFF, "f32": 0x3F800000}


@pytest.mark.parametrize("result", ONES)
def test_set(result):
    form = Form(
        f"set.lt.{result}.s32",
        "f32" if result == "f32" else "b32",
        ("b32", "b32"),
        lambda a, b: ONES[result] if sign_extended(a, 32) < sign_extended(b, 32) else 0,
        EQUAL_OFTEN,
    )
    check(form)


COMBINE = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


@pytest.mark.parametrize("negated", ["", "!"])
@pytest.mark.parametrize("name", COMBINE)
def test_setp_combines_with_a_predicate_and_gives_the_complement(name, negated):
    """The second result is (not compared) combined with the predicate."""
    text = f"""
    and.b32 %c, %c, 1;
    setp.ne.u32 %p2, %c, 0;
    setp.lt.{name}.u32 %p0|%p1, %a, %b, {negated}%p2;
    selp.u32 %x, 1, 0, %p0;
    selp.u32 %c, 2, 0, %p1;
    or.b32 %x, %x, %c;"""

    def reference(a, b, c):
        other = bool(c & 1) != bool(negated)
        first, second = COMBINE[name](a < b, other), COMBINE[name](a >= b, other)
        return int(first) | int(second) << 1

    check(Form(f"setp.lt.{name}", "b32", ("b32",) * 3, reference, text=text))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_selp(bits):
    register = f"b{bits}"
    text = f"and.b32 %c, %c, 1;\nsetp.ne.u32 %p1, %c, 0;\nselp.{register} %x, %a, %b, %p1;"
    check(
        Form(
            f"selp.{register}",
            register,
            (register, register, "b32"),
            lambda a, b, c: a if c & 1 else b,
            text=text,
        )
    )


def test_slct_by_the_sign():
    check(
        Form(
            "slct.b32.s32",
            "b32",
            ("b32", "b32", "b32"),
            lambda a, b, c: a if sign_extended(c, 32) >= 0 else b,
        )
    )
    check(
        Form(
            "slct.b32.f32",
            "b32",
            ("b32", "b32", "f32"),
            lambda a, b, c: a if F32.number(c) >= 0 else b,
            ("int", "int", "f32"),
        )
    )


@pytest.mark.parametrize("name", [*COMBINE, "not"])
def test_logic_on_predicates(name):
    operands = "%p1" if name == "not" else "%p1, %p2"
    text = f"""
    setp.lt.u32 %p1, %a, 0x80000000;
    setp.lt.u32 %p2, %b, 0x80000000;
    {name}.pred %p0, {operands};
    selp.u32 %x, 1, 0, %p0;"""

    def reference(a, b):
        first, second = a < 1 << 31, b < 1 << 31
        return not first if name == "not" else COMBINE[name](first, second)

    check(Form(f"{name}.pred", "b32", ("b32", "b32"), reference, text=text))

"""Arithmetic on f16 and bf16, single and packed: every result is rounded once."""

import numpy as np
import pytest

from python_tests.ptx.formats import BF16, F16, NAN, arithmetic
from python_tests.ptx.support import Form, check, each_half, results
from python_tests.ptx.test_floating import extreme

FORMATS = {"f16": F16, "bf16": BF16}


def rectified(reference, f):
    """.relu: nothing below zero, -0 neither; a NaN stays one."""

    def relu(*a):
        bits = reference(*a)
        return 0 if bits != NAN and f.is_negative(bits) else bits

    return relu


def forms():
    found = []
    for name, f in FORMATS.items():

        def single(instruction, reference, count, name=name):
            kinds = (name,) * count
            return Form(instruction, "b16", ("b16",) * count, reference, kinds, name)

        def pair(instruction, reference, count, name=name):
            kinds = (f"{name}:pair",) * count
            halves = each_half(reference)
            return Form(instruction, "b32", ("b32",) * count, halves, kinds, name, packed=2)

        for op, count in (("add", 2), ("sub", 2), ("mul", 2), ("fma", 3)):
            rounding = ".rn" if op == "fma" or name == "bf16" else ""
            reference = arithmetic(op, f)
            found += [
                single(f"{op}{rounding}.{name}", reference, count),
                pair(f"{op}{rounding}.{name}x2", reference, count),
            ]
        fused = rectified(arithmetic("fma", f), f)
        found += [
            single(f"fma.rn.relu.{name}", fused, 3),
            pair(f"fma.rn.relu.{name}x2", fused, 3),
            single(f"min.{name}", extreme(False, f), 2),
            single(f"max.NaN.{name}", extreme(True, f, nan_wins=True), 2),
            pair(f"max.{name}x2", extreme(True, f), 2),
            single(f"neg.{name}", lambda a: a ^ 0x8000, 1),
            pair(f"abs.{name}x2", lambda a: a & 0x7FFF, 1),
        ]
    return found


@pytest.mark.parametrize("form", forms(), ids=repr)
def test_half_instruction(form):
    check(form)


def test_ftz_flushes_denormals_of_f16():
    def flush(bits):
        return bits if isinstance(bits, str) or bits & F16.infinity else bits & F16.sign

    add = arithmetic("add", F16)
    kinds = ("f16", "f16")
    check(
        Form(
            "add.ftz.f16",
            "b16",
            ("b16", "b16"),
            lambda a, b: flush(add(flush(a), flush(b))),
            kinds,
            "f16",
        )
    )


@pytest.mark.parametrize("operation", ["ex2", "tanh"])
def test_approximation_of_f16(operation):
    x = np.random.default_rng(1).standard_normal(512).astype(np.float16)
    form = Form(f"{operation}.approx.f16", "b16", ("b16",), None)
    got = np.array(results(form, [x.view(np.uint16).astype(np.uint64)]), np.uint16)
    exact = {"ex2": np.exp2, "tanh": np.tanh}[operation](x.astype(np.float64))
    np.testing.assert_array_equal(got.view(np.float16), exact.astype(np.float16))

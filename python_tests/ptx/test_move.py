"""mov, packing and unpacking, special registers."""

import numpy as np
import pytest

from python_tests.ptx.support import Form, check, run

LOW = 0xFFFFFFFF


@pytest.mark.parametrize("register", ["b16", "b32", "b64", "f32", "f64"])
def test_mov(register):
    check(Form(f"mov.{register}", register, (register,), lambda a: a))


@pytest.mark.parametrize("count, part", [(2, "b16"), (2, "b32"), (4, "b16")])
def test_pack_and_unpack(count, part):
    """The first element is the lowest; `_` takes none."""
    bits = int(part[1:])
    whole = f"b{bits * count}"
    names = ["%" + "abcd"[i] for i in range(count)]

    def packed(*a):
        return sum(x << bits * i for i, x in enumerate(a))

    check(
        Form(
            f"mov.{whole} pack",
            whole,
            (part,) * count,
            packed,
            text=f"mov.{whole} %x, {{{', '.join(names)}}};",
        )
    )
    scratch = ["%h1", "%h2", "%h3", "%h4"] if part == "b16" else ["%r5", "%r6"]
    skipped = ", ".join(["_"] * (count - 1) + [scratch[0]])
    check(
        Form(
            f"mov.{whole} unpack",
            part,
            (whole,),
            lambda a: a >> bits * (count - 1),
            text=f"mov.{whole} {{{skipped}}}, %a;\nmov.{part} %x, {scratch[0]};",
        )
    )


def test_b128_moves_two_registers():
    body = """
    .reg .b128 %w<2>;
    ld.global.v2.b64 {%q10, %q11}, [%q0];
    mov.b128 %w0, {%q10, %q11};
    mov.b128 %w1, %w0;
    mov.b128 {%q12, %q13}, %w1;
    st.global.v2.b64 [%q1], {%q13, %q12};"""
    source, swapped, _ = run(body, np.array([3, 5], np.uint64), np.zeros(2, np.uint64), block=1)
    np.testing.assert_array_equal(swapped, source[::-1])


SPECIAL = {
    "tid.x": lambda t, b: t[0],
    "tid.y": lambda t, b: t[1],
    "tid.z": lambda t, b: t[2],
    "ntid.x": lambda t, b: 4,
    "ntid.y": lambda t, b: 3,
    "ctaid.x": lambda t, b: b,
    "nctaid.x": lambda t, b: 2,
    "laneid": lambda t, b: t[3] % 32,
    "warpid": lambda t, b: t[3] // 32,
    "nwarpid": lambda t, b: 2,
    "lanemask_eq": lambda t, b: 1 << t[3] % 32,
    "lanemask_lt": lambda t, b: (1 << t[3] % 32) - 1,
    "lanemask_le": lambda t, b: (2 << t[3] % 32) - 1,
    "lanemask_gt": lambda t, b: LOW & -(2 << t[3] % 32),
    "lanemask_ge": lambda t, b: LOW & -(1 << t[3] % 32),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_register(name):
    """Threads of a block of 4 x 3 x 4 are numbered along x first."""
    body = f"""
    mov.u32 %r2, %tid.y;
    mov.u32 %r3, %tid.z;
    mad.lo.u32 %r0, %r2, 4, %r0;
    mad.lo.u32 %r0, %r3, 12, %r0;
    mov.u32 %r4, %ctaid.x;
    mad.lo.u32 %r0, %r4, 48, %r0;
    mov.u32 %r5, %{name};
    mad.wide.u32 %q10, %r0, 4, %q0;
    st.global.u32 [%q10], %r5;"""
    got, _ = run(body, np.zeros((2, 48), np.uint32), block=(4, 3, 4), grid=2)
    for block in range(2):
        for t in range(48):
            place = (t % 4, t // 4 % 3, t // 12, t)
            assert got[block, t] == SPECIAL[name](place, block)

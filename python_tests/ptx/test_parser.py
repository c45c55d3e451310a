"""How PTX text is read: numbers, names and their scopes, variables and what they begin with."""

import numpy as np
import pytest

from python_tests.ptx.support import HEADER, entry, run
from python_tests.support.ptx import Module, VMError, pointer


@pytest.mark.parametrize(
    "literal, bits",
    [
        ("42", 42),
        ("0x2a", 42),
        ("052", 42),
        ("0b101010", 42),
        ("42U", 42),
        ("-42", -42 & 0xFFFFFFFF),
        ("(40 + 2)", 42),
        ("WARP_SZ", 32),
        ("0f42280000", 0x42280000),
        ("-0f42280000", 0xC2280000),
    ],
)
def test_literals(literal, bits):
    out, _ = run(f"mov.b32 %r4, {literal};\nst.global.b32 [%q0], %r4;", np.zeros(1, np.uint32))
    assert out[0] == bits


@pytest.mark.parametrize("literal", ["1.5", "15.0e-1", "0d3ff8000000000000", "0f3fc00000"])
def test_floating_literals_take_the_instruction_s_format(literal):
    body = f"""
    mov.f32 %f0, {literal};
    mov.f64 %d0, {literal};
    st.global.f32 [%q0], %f0;
    st.global.f64 [%q1], %d0;"""
    single, double, _ = run(body, np.zeros(1, np.float32), np.zeros(1))
    assert single[0] == 1.5
    assert double[0] == 1.5


def test_a_comment_may_stand_anywhere():
    body = """
    // mov.u32 %r4, 1;
    mov.u32 /* the
    destination */ %r4, 7; /* mov.u32 %r4, 2; */ st.global.u32 [%q0], %r4; // the end"""
    out, _ = run(body, np.zeros(1, np.uint32))
    assert out[0] == 7


def test_inner_names_hide_outer_ones_until_their_block_ends():
    body = """
    .reg .b32 %value;
    mov.u32 %value, 1;
    bra NEXT;
    {
      .reg .b32 %value;
      NEXT_INNER:
      mov.u32 %value, 2;
      st.global.u32 [%q0], %value;
      bra NEXT;
      NEXT:  // not the label of the jump before the block
      st.global.u32 [%q0+4], %value;
      bra DONE;
    }
    NEXT:
    st.global.u32 [%q0+8], %value;
    DONE:"""
    out, _ = run(body, np.zeros(3, np.uint32))
    assert list(out) == [0, 0, 1]


def test_numbered_and_plain_registers_with_one_stem():
    body = """
    .reg .b32 %a<3>, %a7;
    mov.u32 %a0, 10;
    mov.u32 %a2, 12;
    mov.u32 %a7, 17;
    st.global.v2.u32 [%q0], {%a0, %a2};
    st.global.u32 [%q0+8], %a7;"""
    out, _ = run(body, np.zeros(3, np.uint32))
    assert list(out) == [10, 12, 17]


VARIABLES = """
.global .align 8 .u32 table[2][3] = {{1, 2, 3}, {4, 5, 6}};
.global .u32 open[] = {7, 8};
.const .f32 constants[4] = {1.5, 0f40000000};
.global .u64 addresses[3] = {table, generic(table) + 8, table + 4};
.global .align 16 .b8 zeros[32];
"""


def test_initialisers():
    m = Module(HEADER + VARIABLES + entry("", parameters=1))
    table = m.variable("table", np.uint32)
    assert list(table) == [1, 2, 3, 4, 5, 6]
    assert list(m.variable("open", np.uint32)) == [7, 8]
    assert list(m.variable("constants", np.float32)) == [1.5, 2, 0, 0]
    at = pointer(table)
    assert [int(a) for a in m.variable("addresses", np.uint64)] == [at, at + 8, at + 4]
    assert not m.variable("zeros").any()


def test_variables_keep_their_values_between_launches():
    declarations = ".global .u32 counter = 5;\n"
    m = Module(HEADER + declarations + entry("red.global.add.u32 [counter], 1;", parameters=1))
    for _ in range(2):
        m.launch("k", 1, 32, args=[None])
    assert m.variable("counter", np.uint32)[0] == 5 + 2 * 32


def test_parameters_lie_where_their_types_say():
    text = f"""{HEADER}
.visible .entry k(.param .u8 a, .param .align 16 .b8 s[12], .param .u16 b, .param .u64 c) {{ ret; }}
"""
    (kernel,) = Module(text).kernels()
    assert [(p.offset, p.size) for p in kernel.parameters] == [(0, 1), (16, 12), (28, 2), (32, 8)]
    assert kernel.parameter_bytes == 40


def test_alignment_of_a_pointee_is_not_the_pointer_s():
    text = f"{HEADER}.visible .entry k(.param .u32 a, .param .u64 .ptr .global .align 256 p) {{ }}"
    (kernel,) = Module(text).kernels()
    assert [(p.offset, p.size) for p in kernel.parameters] == [(0, 4), (8, 8)]


def test_a_definition_may_follow_its_declaration():
    text = f"""{HEADER}
.extern .func (.param .b32 r) seven();
.visible .entry k(.param .u64 p)
{{
  .reg .b32 %r; .reg .b64 %q; .param .b32 r;
  ld.param.u64 %q, [p];
  call (r), seven, ();
  ld.param.b32 %r, [r];
  st.global.u32 [%q], %r;
}}
.func (.param .b32 r) seven() {{ st.param.b32 [r], 7; ret; }}
"""
    m = Module(text)
    out = m.alloc(np.zeros(1, np.uint32))
    m.launch("k", 1, 32, args=[out])
    assert out[0] == 7


@pytest.mark.parametrize(
    "line, message",
    [
        ("mov.u32 %r0, ;", "expected a word"),
        ("mov.u32 %r0 %r1;", "expected ';'"),
        (".reg .v2 .b32 %v;", "vector registers"),
        (".reg .b7 %v;", "unknown register type"),
        ("@%r1 ret;", "guard is not a predicate"),
        (".frobnicate 3;", "unknown directive"),
    ],
)
def test_errors_name_the_line(line, message):
    text = f"{HEADER}.visible .entry k()\n{{\n.reg .b32 %r<4>;\n{line}\nret;\n}}\n"
    with pytest.raises(VMError, match=f"(?s)PTX parse error at line 7.*{message}"):
        Module(text)


@pytest.mark.parametrize("line", ["bra NOWHERE;", "mov.u64 %q4, nothing;", "call unknown, ();"])
def test_unknown_names_stop_the_launch(line):
    m = Module(HEADER + entry(line, parameters=1))
    with pytest.raises(VMError, match="unknown"):
        m.launch("k", 1, 32, args=[None])


def test_text_that_ends_in_a_function():
    with pytest.raises(VMError, match="unexpected end"):
        Module(HEADER + ".visible .entry k() { ret;")

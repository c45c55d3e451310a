"""Branches that part a warp, calls, and what ends a thread or the launch."""

import math

import numpy as np
import pytest

from python_tests.ptx.support import run
from python_tests.support.ptx import VMError

LANES = np.arange(32)
STORE = "add.u64 %q4, %q0, %q8;\nst.global.u32 [%q4], %r9;"
SEEDS = range(4)


def lanes(body: str, declarations="", block=32, **options) -> np.ndarray:
    """What every thread leaves in %r9; %r8 holds zero."""
    text = f"mov.u32 %r8, 0;\nmov.u32 %r9, 0;\n{body}\n{STORE}"
    out, _ = run(
        text, np.zeros(block, np.uint32), block=block, declarations=declarations, **options
    )
    return out


@pytest.mark.parametrize("seed", SEEDS)
def test_branches_in_branches_meet_again(seed):
    body = """
    and.b32 %r4, %r1, 1;
    setp.eq.u32 %p0, %r4, 1;
    @%p0 bra ODD;
    setp.lt.u32 %p1, %r1, 16;
    @%p1 bra LOW;
    mov.u32 %r9, 100;
    bra BOTH;
    LOW: mov.u32 %r9, 200;
    BOTH: add.u32 %r9, %r9, 1;
    bra END;
    ODD: mov.u32 %r9, 300;
    END: activemask.b32 %r5;
    add.u32 %r9, %r9, %r5;"""
    want = np.where(LANES % 2, 300, np.where(LANES < 16, 201, 101)) + 0xFFFFFFFF
    assert (lanes(body, seed=seed) == want.astype(np.uint32)).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_lanes_leave_a_loop_one_by_one(seed):
    body = """
    LOOP: setp.ge.u32 %p0, %r8, %r1;
    @%p0 bra END;
    add.u32 %r9, %r9, %r8;
    add.u32 %r8, %r8, 1;
    bra LOOP;
    END:"""
    assert (lanes(body, seed=seed) == LANES * (LANES - 1) // 2).all()


def test_branch_by_index():
    body = """
    and.b32 %r4, %r1, 3;
    TARGETS: .branchtargets A, B, C, D;
    brx.idx %r4, TARGETS;
    A: mov.u32 %r9, 10; bra END;
    B: mov.u32 %r9, 20; bra END;
    C: mov.u32 %r9, 30; bra END;
    D: mov.u32 %r9, 40;
    END:"""
    assert (lanes(body) == (LANES % 4 + 1) * 10).all()


def test_branch_by_an_index_without_a_target():
    body = "T: .branchtargets A, B;\nbrx.idx %r1, T;\nA: mov.u32 %r9, 1;\nB:"
    with pytest.raises(VMError, match=r"(?s)index out of range.*thread \(2,0,0\)"):
        lanes(body)


@pytest.mark.parametrize("leave", ["exit", "ret"])
def test_threads_that_leave_do_not_hold_up_the_rest(leave):
    body = f"""
    setp.lt.u32 %p0, %r1, 8;
    @%p0 {leave};
    bar.sync 0;
    mov.u32 %r9, 1;"""
    with pytest.raises(VMError, match="missing or exited"):  # warps reach a barrier whole
        lanes(body.replace("bar.sync 0", "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r8]"))
    assert (lanes(body) == (LANES >= 8)).all()


@pytest.mark.parametrize("seed", (0, 1, 3, 6))
def test_a_lock_taken_by_the_lanes_of_one_warp(seed):
    # The lane that holds the lock must have its turn, though the others spin behind it.
    body = """
    TRY: atom.global.cas.b32 %r4, [%q0], 0, 1;
    setp.ne.u32 %p0, %r4, 0;
    @%p0 bra TRY;
    ld.global.u32 %r5, [%q0+4];
    add.u32 %r5, %r5, 1;
    st.global.u32 [%q0+4], %r5;
    atom.global.exch.b32 %r4, [%q0], 0;"""
    out, _ = run(body, np.zeros(2, np.uint32), block=64, grid=2, resident=2, seed=seed)
    assert list(out) == [0, 128]


def test_a_flag_that_nobody_sets_meets_the_step_limit():
    body = "SPIN: ld.global.u32 %r4, [%q0];\nsetp.eq.u32 %p0, %r4, 0;\n@%p0 bra SPIN;"
    with pytest.raises(VMError, match=r"(?s)step limit.*at PTX line"):
        run(body, np.zeros(1, np.uint32), max_steps=10_000)


MULTIPLY_ADD = """
.func (.param .b32 result) multiply_add(.param .b32 a, .param .align 8 .b8 pair[16])
{
  .reg .b32 %r<4>; .reg .b64 %q;
  ld.param.b32 %r0, [a];
  ld.param.b64 %q, [pair];
  ld.param.b32 %r1, [pair+8];
  cvt.u32.u64 %r2, %q;
  mad.lo.u32 %r3, %r0, %r1, %r2;
  st.param.b32 [result], %r3;
  ret;
}
"""
FACTORIAL = """
.func (.param .b32 result) factorial(.param .b32 n)
{
  .reg .b32 %r<4>; .reg .pred %p;
  ld.param.b32 %r0, [n];
  setp.gt.u32 %p, %r0, 1;
  @%p bra MORE;
  st.param.b32 [result], 1;
  ret;
  MORE: sub.u32 %r1, %r0, 1;
  {
    .param .b32 less; .param .b32 product;
    st.param.b32 [less], %r1;
    call (product), factorial, (less);
    ld.param.b32 %r2, [product];
  }
  mul.lo.u32 %r3, %r0, %r2;
  st.param.b32 [result], %r3;
  ret;
}
"""


@pytest.mark.parametrize("callee", ["multiply_add", "%q6"])
def test_call_with_a_struct_by_name_and_by_address(callee):
    body = f"""
    mov.b64 %q6, multiply_add;
    cvt.u64.u32 %q5, %r0;
    {{
      .param .b32 a; .param .align 8 .b8 pair[16]; .param .b32 result;
      st.param.b32 [a], %r0;
      st.param.b64 [pair], %q5;
      st.param.b32 [pair+8], 10;
      P: .callprototype (.param .b32 _) _ (.param .b32 _, .param .align 8 .b8 _[16]);
      call (result), {callee}, (a, pair){", P" if callee[0] == "%" else ""};
      ld.param.b32 %r9, [result];
    }}"""
    assert (lanes(body, MULTIPLY_ADD) == LANES * 11).all()


CALL_FACTORIAL = """
    {
      .param .b32 n; .param .b32 result;
      st.param.b32 [n], %r4;
      call (result), factorial, (n);
      ld.param.b32 %r9, [result];
    }"""


@pytest.mark.parametrize("seed", SEEDS)
def test_recursion_of_another_depth_in_every_lane(seed):
    body = "and.b32 %r4, %r0, 7;" + CALL_FACTORIAL
    want = [math.factorial(t & 7) for t in range(64)]
    assert list(lanes(body, FACTORIAL, block=64, seed=seed)) == want


def test_recursion_without_end_stops():
    with pytest.raises(VMError, match="nest too deeply"):
        lanes("mov.u32 %r4, 1000;" + CALL_FACTORIAL, FACTORIAL)


def test_a_function_may_end_its_thread():
    leaver = """
.func leave_or_not(.param .b32 n)
{
  .reg .b32 %r; .reg .pred %p;
  ld.param.b32 %r, [n];
  setp.lt.u32 %p, %r, 10;
  @%p exit;
  ret;
}
"""
    body = "{ .param .b32 n; st.param.b32 [n], %r0; call leave_or_not, (n); }\nmov.u32 %r9, 1;"
    assert (lanes(body, leaver) == (LANES >= 10)).all()


def test_lanes_that_call_different_functions_are_refused():
    body = """
    mov.b64 %q5, first; mov.b64 %q6, second;
    setp.eq.u32 %p0, %r1, 3;
    selp.b64 %q5, %q6, %q5, %p0;
    P: .callprototype _ ();
    call %q5, (), P;"""
    with pytest.raises(VMError, match=r"(?s)divergent indirect call.*thread \(3,0,0\)"):
        lanes(body, ".func first() { ret; }\n.func second() { ret; }\n")


@pytest.mark.parametrize("value", [0, 12345, 0xF0000077])
def test_calling_what_is_no_function(value):
    with pytest.raises(VMError, match="not a function"):
        lanes(f"mov.u64 %q5, {value};\nP: .callprototype _ ();\ncall %q5, (), P;")


def test_calling_a_function_without_a_body():
    with pytest.raises(VMError, match="external function elsewhere"):
        lanes("call elsewhere, ();", ".extern .func elsewhere();\n")


def test_local_memory_is_the_thread_s_and_the_call_s():
    double = """
.func (.param .b32 result) double_it(.param .b32 n)
{
  .local .align 4 .b8 scratch[8];
  .reg .b32 %r;
  ld.param.b32 %r, [n];
  st.local.u32 [scratch+4], %r;
  ld.local.u32 %r, [scratch+4];
  add.u32 %r, %r, %r;
  st.param.b32 [result], %r;
  ret;
}
"""
    body = """
    .local .align 4 .b8 mine[8];
    st.local.u32 [mine+4], %r0;
    { .param .b32 n; .param .b32 x; st.param.b32 [n], 77; call (x), double_it, (n);
      ld.param.b32 %r5, [x]; }
    ld.local.u32 %r9, [mine+4];
    add.u32 %r9, %r9, %r5;"""
    assert (lanes(body, double) == LANES + 154).all()


def test_trap():
    with pytest.raises(VMError, match=r"(?s)trap executed.*thread \(7,0,0\).*: @%p0 trap;"):
        lanes("setp.eq.u32 %p0, %r0, 7;\n@%p0 trap;")


def test_an_unknown_instruction_counts_only_where_it_is_reached():
    body = "bra OVER;\nfrobnicate.u32 %r4, %r5;\nOVER: mov.u32 %r9, 1;"
    assert (lanes(body) == 1).all()
    with pytest.raises(VMError, match=r"(?s)unknown or unsupported.*frobnicate.u32"):
        lanes(body.replace("bra OVER;", ""))

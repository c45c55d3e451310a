"""ldmatrix, stmatrix and movmatrix: where every element of every 8 x 8 matrix goes."""

import numpy as np
import pytest

from python_tests.ptx.support import run, to_shared
from python_tests.support.ptx import VMError

MATRICES = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)


def fragments(matrices):
    """Registers of every lane, [32, matrices]: elements 2 (l % 4) and the next of row l / 4."""
    out = np.zeros((32, len(matrices)), np.uint32)
    for lane in range(32):
        for m, matrix in enumerate(matrices):
            low, high = matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2]
            out[lane, m] = int(low) | int(high) << 16
    return out


ADDRESSES = ".shared .align 16 .b8 sm[512];\nmov.u32 %r4, sm;\nmad.lo.u32 %r4, %r0, 16, %r4;\n"
REGISTERS = [f"%r{20 + i}" for i in range(4)]


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, trans):
    registers = ", ".join(REGISTERS[:count])
    text = ADDRESSES + to_shared("%q0", "sm", 512) + "bar.sync 0;\n"
    text += f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r4];\n"
    text += f"mad.wide.u32 %q10, %r0, {4 * count}, %q1;\n"
    for i, r in enumerate(REGISTERS[:count]):
        text += f"st.global.u32 [%q10+{4 * i}], {r};\n"
    _, out, _ = run(text, MATRICES, np.zeros((32, count), np.uint32))
    matrices = MATRICES.transpose(0, 2, 1) if trans else MATRICES
    np.testing.assert_array_equal(out, fragments(matrices[:count]))


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count, trans):
    registers = ", ".join(REGISTERS[:count])
    text = ADDRESSES + f"mad.wide.u32 %q10, %r0, {4 * count}, %q0;\n"
    for i, r in enumerate(REGISTERS[:count]):
        text += f"ld.global.u32 {r}, [%q10+{4 * i}];\n"
    text += f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r4], {{{registers}}};\n"
    text += "bar.sync 0;\nld.shared.v4.u32 {%r20, %r21, %r22, %r23}, [%r4];\n"
    text += "add.u64 %q11, %q1, %q9;\nst.global.v4.u32 [%q11], {%r20, %r21, %r22, %r23};\n"
    matrices = MATRICES[:count]
    _, out, _ = run(text, fragments(matrices), np.zeros((4, 8, 8), np.uint16))
    np.testing.assert_array_equal(out[:count], matrices.transpose(0, 2, 1) if trans else matrices)


def test_movmatrix_transposes():
    text = """
    add.u64 %q10, %q0, %q8;
    ld.global.u32 %r20, [%q10];
    movmatrix.sync.aligned.m8n8.trans.b16 %r20, %r20;
    st.global.u32 [%q10], %r20;"""
    out, _ = run(text, fragments(MATRICES[1:2]))
    np.testing.assert_array_equal(out, fragments(MATRICES[1:2].transpose(0, 2, 1)))


def test_rows_are_aligned_and_inside():
    text = ADDRESSES + "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r20}, [%r4+"
    for offset, message in ((8, "misaligned"), (512, "outside the block")):
        with pytest.raises(VMError, match=message):
            run(f"{text}{offset}];")


def test_part_of_a_warp_stops():
    text = ADDRESSES + "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r20}, [%r4];"
    with pytest.raises(VMError, match="whole-warp"):
        run(text, block=16)


@pytest.mark.parametrize("pitch, degree", [(16, 1), (128, 8), (144, 1)])
def test_bank_conflicts_of_rows(pitch, degree):
    """Eight rows are one wavefront if they lie in different banks."""
    text = f"""
    .shared .align 16 .b8 sm[4736];
    mov.u32 %r4, sm;
    mad.lo.u32 %r4, %r0, {pitch}, %r4;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r4];"""
    *_, statistics = run(text)
    assert statistics["shared"]["conflict_degree"] == degree

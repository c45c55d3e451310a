"""Grouped products in bfloat16 with each instruction set that has its own way for them.

The tests before the last run with the set of this process. The last one runs them, and the ops' own
tests on the CPU, once more in processes with the sets that this machine would not choose: AMX in
software where need be.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mergeme_ext
from mergeme_ext import _simt
from python_tests.ops.test_grouped_experts import check as check_experts
from python_tests.ops.test_grouped_experts import make as make_experts
from python_tests.ops.test_grouped_matmul import LAYOUTS, check, draw, make, offsets_of, op
from python_tests.references import amx
from python_tests.support.backends import CPU

ROOT = Path(__file__).parents[2]
CHOSEN = mergeme_ext._load._C.build_info()["cpu_chosen"]
# Rows about the height of a tile, of a block of rows and of two of either.
COUNTS = [0, 1, 2, 13, 14, 15, 16, 17, 29, 31, 32, 33, 47, 0, 49, 65]
BFLOAT16 = torch.bfloat16


@pytest.mark.parametrize("inner", [1, 2, 31, 32, 33, 65, 257, 291])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cpu_rows_depths_and_columns_of_every_kind(layout, inner):
    """291 is beyond the depth of the blocks that tiles multiply at once."""
    for outer in (1, 15, 17, 32, 33, 50):
        args = make(layout, COUNTS, inner, outer, BFLOAT16)
        check(op(CPU, layout)(*args), layout, args)


@pytest.mark.parametrize("inner", [1, 31, 32, 33, 65, 257, 291, 700])
def test_cpu_packed_weights_change_no_bit(inner):
    for counts in (COUNTS, [9], [16], [17], [40]):
        for outer in (1, 32, 33, 70):
            a, weight, offsets = make("nt", counts, inner, outer, BFLOAT16)
            packed = mergeme_ext.ops.pack_experts(weight)
            out = mergeme_ext.ops.packed_matmul(a, packed, offsets, columns=outer)
            assert torch.equal(out, mergeme_ext.grouped_matmul_nt(a, weight, offsets))


def test_cpu_deep_products():
    for layout, counts, inner in (("nt", [1, 40, 16], 1100), ("nn", [1, 40], 1100)):
        args = make(layout, counts, inner, 70, BFLOAT16)
        check(op(CPU, layout)(*args), layout, args)
    args = make("tn", [1100, 530, 31], 40, 35, BFLOAT16)
    check(op(CPU, "tn")(*args), "tn", args)


@pytest.mark.parametrize("depth", [40, 700])
def test_cpu_bits_do_not_depend_on_the_other_rows(depth):
    g = torch.Generator().manual_seed(5)
    a, b = draw((61, depth), BFLOAT16, g), draw((1, 40, depth), BFLOAT16, g)
    together = mergeme_ext.grouped_matmul_nt(a, b, offsets_of([61]))
    for begin, end in ((0, 1), (60, 61), (3, 17), (20, 53)):
        alone = mergeme_ext.grouped_matmul_nt(a[begin:end], b, offsets_of([end - begin]))
        assert torch.equal(alone, together[begin:end])


def test_cpu_bits_do_not_depend_on_the_number_of_threads():
    args = make_experts([127, 0, 129, 1, 33, 16], 2, 70, 45, BFLOAT16)
    one = CPU.op("grouped_experts")(*args)[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(CPU.op("grouped_experts")(*args)[0], one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("counts", [[0, 1, 15, 16], [17, 33, 127, 129]], ids=str)
def test_cpu_experts(counts):
    for hidden, intermediate in ((7, 33), (64, 50), (290, 96)):
        args = make_experts(counts, 2, hidden, intermediate, BFLOAT16)
        check_experts(CPU.op("grouped_experts")(*args)[0], args)


def test_cpu_infinities_and_nans_stay_in_their_row_and_column():
    a, b, offsets = make("nt", [20, 3], 33, 40, BFLOAT16)
    a[4, 32], b[1, 39, 0] = torch.inf, torch.nan
    out = mergeme_ext.grouped_matmul_nt(a, b, offsets)
    assert not out[4].isfinite().any() and out[20:, 39].isnan().all()
    out[4], out[20:, 39] = 0, 0
    assert out.isfinite().all()


@pytest.mark.skipif(CHOSEN != "amx", reason="tiles are in use with the set amx only")
def test_cpu_tiles_are_used_and_given_back():
    """A configuration that another library left on the thread, and relies on, is there again."""
    args = make("nt", [3, 40], 64, 48, BFLOAT16)
    before = _simt.emulated_amx_instructions()["tdpbf16ps"]
    for config in (bytes(64), amx.config([(3, 24), (16, 64), (1, 4)])):
        _simt.run_amx_program([("ldtilecfg", [0])], config)
        mergeme_ext.grouped_matmul_nt(*args)
        after = _simt.run_amx_program([("sttilecfg", [0]), ("tilerelease", [])], bytes(64))
        assert after == config
    products = _simt.emulated_amx_instructions()["tdpbf16ps"] - before
    # Of 3 rows: 2 steps, 4 column tiles (the last one empty); of 40: three tiles of rows.
    assert products in (0, 2 * (2 * 4 + 2 * 4 * 3))  # none where the processor did them


def run_with(isa, command):
    environment = os.environ | {
        "MERGEME_CPU_ISA": isa,
        "MERGEME_CPU_ISA_UNCHECKED": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *command]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


PROBE = """
import torch, mergeme_ext
one = torch.ones(1, 1, 1, dtype=torch.bfloat16)
mergeme_ext.grouped_matmul_nt(one[0], one, torch.tensor([0, 1], dtype=torch.int32))
"""


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx512", "avx512_bf16", "amx"])
def test_ops_with_another_set(isa):
    if isa == CHOSEN:
        pytest.skip("this process's own")
    available = mergeme_ext._load._C.build_info()["cpu_available"]
    if "avx512" not in available:
        pytest.skip("needs AVX-512")
    # Some processors have VDPBF16PS and may not say so.
    if isa == "avx512_bf16" and run_with(isa, ["-c", PROBE]).returncode != 0:
        pytest.skip("needs AVX512-BF16")
    files = ["grouped_matmul", "grouped_experts", "packed_experts", "matrix_sets"]
    paths = [f"python_tests/ops/test_{name}.py" for name in files]
    done = run_with(
        isa, ["-m", "pytest", "-q", "-k", "not simt and not cuda", "-m", "not slow", *paths]
    )
    assert done.returncode == 0, done.stdout[-4000:]

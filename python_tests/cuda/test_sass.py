"""The compiler's output for the tensor-core kernels, held to the table in benchmarks/sass.json."""

import pytest

from benchmarks import sass

KERNELS = [key[:2] for key in sass.KERNELS]


@pytest.fixture(scope="module")
def measured():
    try:
        return sass.measure()
    except sass.MissingToolError as error:
        pytest.skip(str(error))


def by_key(table):
    return {(r["op"], r["kernel"], r["arch"]): r for r in table["rows"]}


def test_table_names_every_kernel_and_the_yardstick():
    keys = {(*key, arch) for key in [*KERNELS, sass.YARDSTICK] for arch in sass.ARCHES}
    assert set(by_key(sass.read_table())) == keys


def test_readme_shows_the_table():
    assert sass.markdown(sass.read_table()) in sass.README.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("arch", sass.ARCHES)
@pytest.mark.parametrize("kernel", KERNELS, ids=" ".join)
def test_no_spills_and_the_expected_instructions(measured, kernel, arch):
    row = by_key(measured)[(*kernel, arch)]
    assert row["stack"] == row["spilled"] == row["local"] == 0, row
    assert row["registers"] <= 255
    # Every stage is multiplied once: 16 x 8 x 16 by an HMMA, four warps for the tile.
    rows = int(kernel[1].split()[-1]) if kernel[1][-1].isdigit() else 128
    steps = 32 if rows == 128 else 64
    assert row["HMMA"] == rows * 128 * steps // (16 * 8 * 16) // 4
    # 16 bytes for each thread and copy; ldmatrix brings four 8 x 8 matrices.
    assert row["LDGSTS"] == (rows + 128) * steps * 2 // 16 // 128
    assert row["LDSM"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", sass.ARCHES)
@pytest.mark.parametrize("kernel", KERNELS, ids=" ".join)
def test_figures_are_those_of_the_table(measured, kernel, arch):
    new, old = by_key(measured)[(*kernel, arch)], by_key(sass.read_table())[(*kernel, arch)]
    if measured["nvcc"] == sass.read_table()["nvcc"]:
        assert new == old, "python -m benchmarks.sass --write"
    else:  # another compiler schedules and allocates a little differently
        assert new["loop"] <= 1.1 * old["loop"]


@pytest.mark.parametrize("arch", sass.ARCHES)
def test_main_loop_is_no_longer_than_the_yardsticks(arch):
    rows = by_key(sass.read_table())
    ours, theirs = rows["grouped_matmul", "nt 128", arch], rows[(*sass.YARDSTICK, arch)]
    assert ours["HMMA"] == theirs["HMMA"]
    assert ours["loop"] <= theirs["loop"] and ours["registers"] <= theirs["registers"]


LISTING = """
\tFunction : _Z4kernv
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDL.64 R2, [R1] ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R132.reuse, R136, R4 ;
        /*0030*/                   LDSM.16.M88.4 R164, [R192] ;
        /*0040*/               @P0 BRA 0x20 ;
        /*0050*/               @P1 BRA 0x0 ;
        /*0060*/                   BRA 0x60 ;
"""


def test_main_loop_is_the_shortest_with_a_tensor_core_instruction(tmp_path):
    tool = tmp_path / "cuobjdump"
    tool.write_text(f"#!/bin/sh\ncat <<'EOF'\n{LISTING}\nEOF\n")
    tool.chmod(0o755)
    listing = sass.disassemble(str(tool), tmp_path / "any.cubin")
    assert list(listing) == ["_Z4kernv"]
    figures = sass.loop_figures(listing["_Z4kernv"])
    assert figures == {
        "local": 1,
        "instructions": 7,
        "loop": 3,
        "HMMA": 1,
        "LDSM": 1,
        "LDGSTS": 0,
    }


def test_ptxas_figures_of_every_kernel():
    report = """
ptxas info    : Compiling entry function '_Z1av' for 'sm_80'
ptxas info    : Function properties for _Z1av
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size
ptxas info    : Compiling entry function '_Z1bv' for 'sm_80'
ptxas info    : Function properties for _Z1bv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
"""
    assert sass.ptxas_figures(report) == {
        "_Z1av": {"registers": 255, "stack": 8, "spilled": 16},
        "_Z1bv": {"registers": 40, "stack": 0, "spilled": 0},
    }

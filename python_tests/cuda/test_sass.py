"""The compiler's output for all kernels, held to the tables in benchmarks/sass.json."""

import copy

import pytest

from benchmarks import device_code, sass, yardsticks
from python_tests.house.test_layout import CPU_ONLY, OPS

TABLE = sass.read_table()
# Both products of the experts and the plain one, forward and backward, at full tiles.
FULL_TILES = {
    ("grouped_matmul", f"grouped_matmul_sm80_kernel<{layout}, 128>")
    for layout in ("nt", "nn", "tn")
} | {
    ("grouped_experts", name)
    for name in (
        "gate_up_sm80_kernel<128>",
        "rows_sm80_kernel<true, 128>",
        "rows_sm80_kernel<false, 128>",
        "grad_activation_sm80_kernel<128>",
        "sums_sm80_kernel<true>",
        "sums_sm80_kernel<false>",
    )
}


@pytest.fixture(scope="module")
def measured():
    try:
        return sass.measure(yardsticks.find_headers())
    except device_code.MissingToolError as error:
        pytest.skip(str(error))


def row(op="grouped_matmul", kernel="nt", arch="80", **figures):
    base = {"op": op, "kernel": kernel, "arch": arch, "registers": 100, "stack": 0, "spilled": 0}
    base |= {"local": 0, "instructions": 1000, "loop": 135, "shape": "HMMA.16816", "mma": 64}
    return base | {"shared": 0, "variants": 1, "warnings": []} | figures


def tables(**figures):
    return {"loops": [row(**figures)], "kernels": [row(**figures)]}


@pytest.mark.slow
def test_nothing_is_worse_than_in_the_table(measured):
    assert sass.complaints(measured, TABLE) == [], "python -m benchmarks.sass --write"


@pytest.mark.slow
def test_table_names_every_kernel_and_no_other(measured):
    for part in ("kernels", "loops"):
        found = {sass.key(r) for r in measured[part] if sass._is_ours(r)}
        assert found == {sass.key(r) for r in TABLE[part] if sass._is_ours(r)}


def test_committed_table_has_no_complaints():
    assert sass.complaints(TABLE, TABLE) == []


def test_table_has_every_op_and_every_yardstick():
    assert {r["op"] for r in TABLE["kernels"]} == set(OPS) - CPU_ONLY
    theirs = {sass.key(r) for r in TABLE["loops"] if not sass._is_ours(r)}
    assert theirs == {(y.library, y.name, a) for y in yardsticks.YARDSTICKS for a in y.arches}


@pytest.mark.parametrize("arch", sass.ARCHES)
def test_full_tiles_are_no_longer_than_1_25_of_the_yardstick(arch):
    rows = {sass.key(r): r for r in TABLE["loops"]}
    for op, kernel in FULL_TILES:
        found = rows[op, kernel, arch]
        assert found["mma"] == 64 and found["LDSM"] == 16 and found["LDGSTS"] == 8
        assert sass.ratio_to_yardstick(found, TABLE) <= sass.PARITY


WGMMA = [r for r in TABLE["loops"] if sass._is_ours(r) and "GMMA" in r["shape"]]


@pytest.mark.parametrize("row", WGMMA, ids=lambda r: f"{r['op']} {r['kernel']}")
def test_kernels_with_wgmma_are_what_they_were_designed_to_be(row):
    assert row["warnings"] == [] and row["spilled"] == row["stack"] == row["local"] == 0
    assert row["registers"] <= 168  # at launch: three warpgroups of 128 threads in 65536
    assert row["whole"]["UTMALDG"] > 0 and row["whole"]["USETMAXREG"] >= 2
    if row["kernel"].startswith("gate_up"):
        assert row["whole"]["LDGSTS"] > 0  # rows of tokens anywhere
    assert sass.ratio_to_yardstick(row, TABLE) <= sass.PARITY


def test_every_product_has_a_kernel_with_wgmma():
    names = {(r["op"], r["kernel"].split("<")[0]) for r in WGMMA}
    assert names >= {("grouped_matmul", "grouped_matmul_sm90_kernel")} | {
        ("grouped_experts", f"{k}_sm90_kernel")
        for k in ("gate_up", "rows", "sums", "grad_activation")
    } | {
        ("grouped_matmul_fp8", "grouped_matmul_fp8_sm90_kernel"),
        ("grouped_experts_fp8", "gate_up_fp8_sm90_kernel"),
    }


def test_readme_shows_the_tables():
    text = sass.README.read_text()
    assert sass.loops_markdown(TABLE) in text and sass.kernels_markdown(TABLE) in text


WORSE = [
    ({"spilled": 4}, "4 bytes spilled"),
    ({"stack": 8}, "8 bytes of stack"),
    ({"registers": 111}, "registers 111, was 100"),
    ({"shared": 16}, "shared 16, was 0"),
    ({"instructions": 1101}, "instructions 1101, was 1000"),
    ({"loop": 149}, "loop 149, was 135"),
    ({"warnings": ["C7510"]}, "ptxas remarks C7510"),
    ({"kernel": "nn"}, "not in sass.json"),
]


@pytest.mark.parametrize("figures, message", WORSE)
def test_what_is_worse_is_reported(figures, message):
    found = sass.complaints(tables(**figures), tables())
    assert any(message in line for line in found), found


@pytest.mark.parametrize("figures", [{}, {"registers": 110}, {"loop": 120}, {"instructions": 900}])
def test_what_is_better_or_near_is_not(figures):
    assert sass.complaints(tables(**figures), tables()) == []


def test_main_loop_is_held_to_the_yardstick():
    old = {"loops": [row(loop=170)], "kernels": []}
    theirs = row(op=yardsticks.CUTLASS, kernel="grouped", loop=128)
    new = copy.deepcopy(old)
    assert sass.complaints(new, old) == []
    new["loops"].append(theirs)
    assert any("1.33 x the yardstick's" in line for line in sass.complaints(new, old))
    new["loops"][0]["mma"] = 16  # fewer rows: none to compare with
    assert sass.complaints(new, old) == []


def test_wgmma_is_compared_by_multiply_adds():
    theirs = [
        row(yardsticks.DEEP_GEMM, "wide", "90a", loop=48, mma=4, shape="HGMMA.64x256x16"),
        row(yardsticks.DEEP_GEMM, "narrow", "90a", loop=36, mma=4, shape="HGMMA.64x128x16"),
    ]
    same = row(arch="90a", loop=60, mma=4, shape="HGMMA.64x256x16")
    other = row(arch="90a", loop=27, mma=4, shape="HGMMA.64x192x16")
    assert sass.ratio_to_yardstick(same, {"loops": theirs}) == pytest.approx(1.25)
    assert sass.ratio_to_yardstick(other, {"loops": theirs}) == pytest.approx(0.5)
    assert sass.equivalents("HMMA.16816", 128) == sass.equivalents("QGMMA.64x128x32", 1) == 1


@pytest.mark.parametrize(
    "readable, name, dtypes",
    [
        (
            "void mergeme::a::b_kernel<mergeme::float16_t, (mergeme::a::Layout)0, 128>"
            "(mergeme::a::Params)",
            "b_kernel<nt, 128>",
            "float16_t",
        ),
        (
            "void mergeme::a::e_kernel<mergeme::bfloat16_t, true, mergeme::g::sm90::Shape<64, 256, "
            "1, 2> >(mergeme::g::WithMaps<mergeme::a::P>)",
            "e_kernel<true, 64x256, 1 groups, cluster of 2>",
            "bfloat16_t",
        ),
        ("void mergeme::a::c_kernel<double, (bool)1>(mergeme::a::P)", "c_kernel<1>", "double"),
        ("mergeme::a::d_kernel(mergeme::a::Params)", "d_kernel", ""),
    ],
)
def test_kernels_are_named_without_their_dtypes(readable, name, dtypes):
    assert sass.kernel_name(readable) == (name, dtypes)


LISTING = """
\tFunction : _Z4kernv
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDL.64 R2, [R1] ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R132.reuse, R136, R4 ;
        /*0030*/                   LDSM.16.M88.4 R164, [R192] ;
        /*0040*/               @P0 BRA 0x20 ;
        /*0050*/               @P1 BRA 0x0 ;
        /*0060*/                   BRA 0x60 ;
        /*0070*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4] ;
        /*0080*/              @!P0 BRA 0x70 ;
        /*0090*/                   BRA 0x20 ;
"""


def test_main_loop_is_the_tightest_with_a_tensor_core_instruction(tmp_path):
    tool = tmp_path / "cuobjdump"
    tool.write_text(f"#!/bin/sh\ncat <<'EOF'\n{LISTING}\nEOF\n")
    tool.chmod(0o755)
    listing = device_code.disassemble(str(tool), tmp_path / "any.cubin")
    assert list(listing) == ["_Z4kernv"]
    figures = device_code.loop_figures(listing["_Z4kernv"])
    assert (figures.local, figures.instructions, figures.loop, figures.mma) == (1, 10, 3, 1)
    assert figures.shape == "HMMA.16816" and figures.in_loop == {"LDSM": 1}


REPORT = """
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized \
due to insufficient register resources for the wgmma pipeline in the function '_Z1av'
ptxas info    : Compiling entry function '_Z1av' for 'sm_80'
ptxas info    : Function properties for _Z1av
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size, 32 bytes smem
ptxas info    : Compiling entry function '_Z1bv' for 'sm_80'
ptxas info    : Function properties for _Z1bv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
"""


def test_ptxas_figures_of_every_kernel():
    assert device_code.ptxas_figures(REPORT) == {
        "_Z1av": {"registers": 255, "stack": 8, "spilled": 16, "shared": 32},
        "_Z1bv": {"registers": 40, "stack": 0, "spilled": 0, "shared": 0},
    }
    assert [code for code, _ in device_code.ptxas_warnings(REPORT)] == ["C7510"]

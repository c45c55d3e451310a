"""Counts of the grouped kernels from the PTX interpreter, by which benchmarks.gpu_model predicts.

    python -m benchmarks.gpu_counts            # count, compare with benchmarks/gpu_counts.json
    python -m benchmarks.gpu_counts --write    # and write it

Large shapes cannot be interpreted whole, and need not be: a kernel's counts are linear in its tiles
and in their steps along the reduction. Three small runs give the counts of a launch, of a tile and
of a step; a fourth of other sizes must come out as they predict. Needs nvcc, a build with
MERGEME_SIMT=1, and the yardsticks' headers (benchmarks/yardsticks). No GPU.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks import sass
from benchmarks.device_code import ROOT, MissingToolError, find_nvcc
from benchmarks.yardsticks import CUTLASS, DEEP_GEMM, find_headers

TABLE = ROOT / "benchmarks/gpu_counts.json"
# What is counted: warp instructions of the PTX, wavefronts of shared memory, 32-byte sectors.
COUNTS = ("instructions", "wavefronts", "sectors")
# Shares by which a count may miss the prediction: of instructions, since waits and bounds differ.
SLACK = {"instructions": 0.02, "wavefronts": 0.005, "sectors": 0.02}


@dataclass(frozen=True)
class Kernel:
    """A kernel's tile, what it takes of an SM, and its counts."""

    who: str  # ours, or the library
    role: str  # gate_up, down; nt for a plain product
    name: str
    arch: str
    rows: int
    columns: int  # of the product, gate and up columns alike
    depth: int  # reduction steps of a stage
    stages: int
    threads: int
    math_warps: int
    registers: int
    shared: int
    loop: float  # SASS instructions of a math warp for one stage
    launch: dict[str, float]
    tile: dict[str, float]
    step: dict[str, float]


@dataclass(frozen=True)
class Run:
    """One run: tiles of the launch, stages of a tile, and what was counted."""

    tiles: int
    steps: int
    counts: dict[str, float]


def counts_of(statistics: dict) -> dict[str, float]:
    sectors = sum(statistics[k]["sectors"] for k in ("global_load", "global_store"))
    return {
        "instructions": statistics["warp_instructions"],
        "wavefronts": statistics["shared"]["wavefronts"],
        "sectors": sectors,
    }


def fit(runs: list[Run], check: Run) -> tuple[dict, dict, dict]:
    """(launch, tile, step) counts from three runs; raises where they do not predict ``check``."""
    matrix = np.array([[1, r.tiles, r.tiles * r.steps] for r in runs], float)
    parts: list[dict[str, float]] = [{}, {}, {}]
    for name in COUNTS:
        solved = np.linalg.solve(matrix, [r.counts[name] for r in runs])
        predicted = solved @ [1, check.tiles, check.tiles * check.steps]
        if abs(predicted - check.counts[name]) > max(SLACK[name] * check.counts[name], 4):
            raise RuntimeError(
                f"{name} are not linear: predicted {predicted:.0f}, counted {check.counts[name]}"
            )
        for part, value in zip(parts, solved, strict=True):
            part[name] = round(float(value), 3)
    return parts[0], parts[1], parts[2]


def _experts(backend: str, rows: int, hidden: int, intermediate: int) -> dict[str, dict]:
    """Statistics of the forward's kernels for one expert with a full tile, by kernel.

    Beside an idle expert, since tiles of ``rows`` < 128 serve experts with half as many on average.
    """
    import torch

    from mergeme_ext.ops import sort_by_expert
    from python_tests.support import backends, ptx

    op = getattr(torch.ops, getattr(backends, backend.upper()).namespace).grouped_experts.default
    g = torch.Generator().manual_seed(0)

    def values(*sizes: int) -> torch.Tensor:
        return (torch.randn(sizes, generator=g) * sizes[-1] ** -0.5).bfloat16()

    ids = torch.zeros(rows, 1, dtype=torch.int32)
    arguments = (values(rows, hidden), values(2, 2 * intermediate, hidden))
    arguments += (values(2, hidden, intermediate), torch.ones(rows, 1))
    with ptx.recording() as launches:
        op(*arguments, *sort_by_expert(ids, 2))
    return {sass.kernel_name(x.kernel)[0]: asdict(x) for x in launches}


# By tile (rows, columns of the product): steps of a stage and stages; stages and warpgroups that
# share a tile. A cluster's pair of tiles is left out: its blocks' tiles are those of 128 x 256.
_SM80 = {(128, 128): (32, 4), (64, 128): (64, 3), (32, 128): (64, 3), (16, 128): (64, 4)}
_SM90 = {(128, 256): (4, 2), (128, 128): (6, 1), (64, 256): (4, 1)}


def _variants() -> list[dict]:
    """Our kernels: every tile of gate_up and down."""
    found = []
    for (rows, columns), (depth, stages) in _SM80.items():
        common = {"backend": "ptx80", "arch": "80", "rows": rows, "columns": columns}
        common |= {"depth": depth, "stages": stages, "threads": 128, "math_warps": 4}
        found.append(common | {"role": "gate_up", "kernel": f"gate_up_sm80_kernel<{rows}>"})
        found.append(common | {"role": "down", "kernel": f"rows_sm80_kernel<true, {rows}>"})
    for (rows, columns), (stages, groups) in _SM90.items():
        common = {"backend": "ptx90", "arch": "90a", "rows": rows, "columns": columns, "depth": 64}
        common |= {"stages": stages, "threads": 384, "math_warps": 4 * groups}
        shape = f"{rows}x{columns}, {groups} groups"
        found.append(common | {"role": "gate_up", "kernel": f"gate_up_sm90_kernel<{shape}>"})
        found.append(common | {"role": "down", "kernel": f"rows_sm90_kernel<true, {shape}>"})
    return found


def _run_ours(variant: dict, tiles: int, steps: int) -> tuple[Run, int]:
    """(counts, shared bytes) of one run of a product of ours."""
    depth, columns = variant["depth"] * steps, variant["columns"] * tiles
    # The other product is as small as it can be without choosing another kernel.
    sizes = (depth, columns // 2) if variant["role"] == "gate_up" else (columns, depth)
    record = _experts(variant["backend"], variant["rows"], *sizes)[variant["kernel"]]
    operations = record["statistics"]["ops"]
    if variant["arch"] == "80":
        products = tiles * steps * variant["rows"] * variant["columns"] * variant["depth"]
        assert operations["mma.sync"][0] * 16 * 8 * 16 == products
    return Run(tiles, steps, counts_of(record["statistics"])), record["shared_bytes"]


def count_ours(table: dict) -> list[Kernel]:
    """gate_up and down with every tile that the launchers choose among."""
    loops = {sass.key(r): r for r in table["loops"]}
    found = []
    for variant in _variants():
        # The device that the interpreter shows holds three blocks, so six tiles and multiples give
        # each the same number. Reductions of more than 1024 steps get tiles of their own.
        few = 17 if variant["arch"] == "90a" and variant["columns"] == 256 else 8
        runs = [(6, few), (6, 2 * few - 2), (12, few), (18, few + 2)]
        if variant["arch"] == "90a" and variant["columns"] == 128:
            runs = [(6, 8), (6, 16), (12, 8), (18, 12)]
        counted = [_run_ours(variant, *run) for run in runs]
        launch, tile, step = fit([r[0] for r in counted[:3]], counted[3][0])
        row = loops["grouped_experts", variant["kernel"], variant["arch"]]
        fields = {k: v for k, v in variant.items() if k not in ("backend", "kernel")}
        found.append(
            Kernel(
                **fields,
                who="ours",
                name=variant["kernel"],
                registers=row["registers"],
                shared=counted[0][1],
                # For a stage of the tile; a loop may hold more or less than one.
                loop=round(_stage_of_loop(row, variant), 2),
                launch=launch,
                tile=tile,
                step=step,
            )
        )
    return found


def _stage_of_loop(row: dict, variant: dict) -> float:
    """SASS instructions of a math warp for one stage."""
    products = variant["rows"] * variant["columns"] * variant["depth"]
    if row["shape"].startswith("HMMA"):
        own = products / variant["math_warps"] / (16 * 8 * 16)
    else:
        own = products / (variant["math_warps"] / 4) / (sass.equivalents(row["shape"], 1) * 262144)
    return row["loop"] * own / row["mma"]


def _ptx(yardstick_source: str, arch: str, flags: list[str], folder: Path) -> str:
    out = folder / f"{yardstick_source}.ptx"
    command = [find_nvcc(), *flags, f"-arch=sm_{arch}", "-ptx", "-o", str(out)]
    source = ROOT / "benchmarks/yardsticks" / yardstick_source
    subprocess.run([*command, str(source)], check=True, cwd=ROOT, capture_output=True)
    return out.read_text()


def _operands(rows: int, columns: int, depth: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """bfloat16 bits of A [rows, depth] and B [columns, depth], and their product in float64."""
    from python_tests.support.ptx import bf16, from_bf16

    g = np.random.default_rng(0)
    a, b = (bf16(g.standard_normal((n, depth))) for n in (rows, columns))
    return a, b, from_bf16(a).astype(float) @ from_bf16(b).astype(float).T


def _assert_product(got: np.ndarray, expected: np.ndarray, depth: int) -> None:
    """bfloat16 results of float32 sums: a rounding, and the sum's own error."""
    from python_tests.support.ptx import from_bf16

    bound = 2.0**-8 * np.abs(expected) + depth * 2.0**-24 * np.abs(expected).max()
    assert (np.abs(from_bf16(got) - expected) <= bound).all()


def count_deep_gemm(include: Path, table: dict, folder: Path) -> Kernel:
    """DeepGEMM's grouped bfloat16 kernel with the tile 128 x 256 x 64, without multicast."""
    from python_tests.support.ptx import Module, tensor_map

    flags = ["-std=c++20", "--expt-relaxed-constexpr", f"-I{include}", "-DMULTICAST=1"]
    text = _ptx("deep_gemm_bf16.cu", "90a", flags, folder)
    # It hands stmatrix.shared a generic address, which GPUs cut to the 32 bits that they need.
    text = re.sub(
        r"(stmatrix\.sync\S*) \[(%rd\d+)\],(.*?);",
        r"{ .reg .b64 %inside; cvta.to.shared.u64 %inside, \2; \1 [%inside],\3; }",
        text,
    )
    module = Module(text)
    kernel = module.kernels()[0].name
    shared = 128 * 256 * 2 + 3 * (128 + 256) * 64 * 2 + 128

    def run(tiles: int, steps: int) -> Run:  # steps = 3 n + 1, as it was compiled for
        m, n, k = 128 * tiles, 256, 64 * steps
        a, b, expected = _operands(m, n, k)
        a, b = module.alloc(a, "A", readonly=True), module.alloc(b, "B", readonly=True)
        d = module.alloc(np.full((m, n), 0x7FC0, np.uint16), "D")
        # A tile looks at the group of its neighbour, which the last may not have.
        groups = module.alloc(np.zeros(m + 128, np.int32), "groups", readonly=True)
        maps = [
            tensor_map(a, (k, m), (2 * k,), (64, 128), swizzle=128),
            tensor_map(b, (k, n), (2 * k,), (64, 256), swizzle=128),
            tensor_map(d, (n, m), (2 * n,), (64, 128), swizzle=128),
        ]
        sizes = [np.uint32(x) for x in (m, n, k)]
        st = module.launch(kernel, tiles, 384, smem=shared, args=[groups, *sizes, *maps])
        _assert_product(d, expected, k)
        module.unregister(a, b, d, groups)
        return Run(tiles, steps, counts_of(st))

    (row,) = (r for r in table["loops"] if r["op"] == DEEP_GEMM and "256x64" in r["kernel"])
    launch, tile, step = fit([run(1, 4), run(1, 10), run(2, 4)], run(3, 7))
    return Kernel(
        who=DEEP_GEMM,
        role="nt",
        name=row["kernel"],
        arch="90a",
        rows=128,
        columns=256,
        depth=64,
        stages=3,
        threads=384,
        math_warps=8,
        registers=row["registers"],
        shared=shared,
        # Each math warpgroup has half the rows, so four wgmma of 64 x 256 x 16 a stage.
        loop=4 * row["loop"] / row["mma"],
        launch=launch,
        tile=tile,
        step=step,
    )


def count_cutlass_sm80(include: Path, table: dict, folder: Path) -> Kernel:
    """The grouped kernel of CUTLASS 2.x with the tile 128 x 128 x 32."""
    from python_tests.support.ptx import Module, pointer

    flags = ["-std=c++17", "--expt-relaxed-constexpr", f"-I{include}"]
    module = Module(_ptx("cutlass_sm80.cu", "80", flags, folder))
    kernel, program = module.kernels()[0].name, folder / "params"
    source = ROOT / "benchmarks/yardsticks/cutlass_sm80.cu"
    command = [find_nvcc(), *flags, "-arch=sm_80", "-DPARAMS", "-o", str(program), str(source)]
    subprocess.run(command, check=True, capture_output=True)

    def run(tiles: int, steps: int) -> tuple[Run, int, int]:
        m, n, k = 128, 128 * tiles, 32 * steps
        a, b, expected = _operands(m, n, k)
        a, b = module.alloc(a, "A", readonly=True), module.alloc(b, "B", readonly=True)
        d = module.alloc(np.full((m, n), 0x7FC0, np.uint16), "D")
        tables = [np.array([[m, n, k]], np.int32)]
        tables += [np.array([pointer(x)], np.uint64) for x in (a, b, d)]
        tables += [np.array([x], np.int64) for x in (k, k, n)]
        tables = [module.alloc(x, "table", readonly=True) for x in tables]
        numbers = [1, 1, *map(pointer, tables)]
        done = subprocess.run(
            [program, *map(str, numbers)], check=True, capture_output=True, text=True
        )
        threads, shared, params = done.stdout.split()
        st = module.launch(kernel, 1, int(threads), smem=int(shared), params=bytes.fromhex(params))
        _assert_product(d, expected, k)
        module.unregister(a, b, d, *tables)
        return Run(tiles, steps, counts_of(st)), int(threads), int(shared)

    (row,) = (r for r in table["loops"] if r["op"] == CUTLASS and r["arch"] == "80")
    runs = [run(1, 8), run(1, 16), run(2, 8), run(3, 12)]
    launch, tile, step = fit([r[0] for r in runs[:3]], runs[3][0])
    return Kernel(
        who=CUTLASS,
        role="nt",
        name=row["kernel"],
        arch="80",
        rows=128,
        columns=128,
        depth=32,
        stages=4,
        threads=runs[0][1],
        math_warps=4,
        registers=row["registers"],
        shared=runs[0][2],
        loop=row["loop"],
        launch=launch,
        tile=tile,
        step=step,
    )


def count() -> list[Kernel]:
    """Counts of all kernels that the model knows."""
    table, headers = sass.read_table(), find_headers()
    found = count_ours(table)
    counters: dict[str, Callable[[Path, dict, Path], Kernel]] = {
        CUTLASS: count_cutlass_sm80,
        DEEP_GEMM: count_deep_gemm,
    }
    with tempfile.TemporaryDirectory() as folder:
        for library, counter in counters.items():
            if library not in headers:
                raise MissingToolError(f"no headers of {library}: see benchmarks/yardsticks")
            found.append(counter(headers[library], table, Path(folder)))
    return found


def read_table() -> list[Kernel]:
    return [Kernel(**row) for row in json.loads(TABLE.read_text())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table instead")
    args = parser.parse_args()
    try:
        found = count()
    except MissingToolError as error:
        print(f"gpu_counts: {error}", file=sys.stderr)
        return 2
    rows = ",\n".join("  " + json.dumps(asdict(k)) for k in found)
    if args.write:
        TABLE.write_text(f"[\n{rows}\n]\n")
        return 0
    print(rows)
    return int(found != read_table())


if __name__ == "__main__":
    sys.exit(main())

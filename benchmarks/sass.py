"""What nvcc makes of the tensor-core kernels of the grouped ops: registers, spills, the main loop.

    python -m benchmarks.sass                    # compile, compare with benchmarks/sass.json
    python -m benchmarks.sass --write            # compile, write it and the table in the README
    python -m benchmarks.sass --cutlass INCLUDE  # headers, if not of the package nvidia-cutlass

Needs nvcc, and cuobjdump from the CUDA toolkit or from the package triton. No GPU.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "benchmarks/sass.json"
README = ROOT / "benchmarks/README.md"
ARCHES = (80, 90)
# The flags of mergeme_device in CMakeLists.txt.
FLAGS = ["-std=c++20", "-fmad=false", "--extended-lambda", "--expt-relaxed-constexpr"]

# By op, the name in the table, the kernel and its parameters. bfloat16 stands for float16 too.
_OF_OP = {
    "grouped_matmul": [
        ("nt 128", "grouped_matmul_sm80_kernel<bfloat16_t, Layout::kNt, 128>", "Params"),
        ("nn 128", "grouped_matmul_sm80_kernel<bfloat16_t, Layout::kNn, 128>", "Params"),
        ("tn 128", "grouped_matmul_sm80_kernel<bfloat16_t, Layout::kTn, 128>", "Params"),
        ("nt 64", "grouped_matmul_sm80_kernel<bfloat16_t, Layout::kNt, 64>", "Params"),
        ("nt 32", "grouped_matmul_sm80_kernel<bfloat16_t, Layout::kNt, 32>", "Params"),
        ("nt 16", "grouped_matmul_sm80_kernel<bfloat16_t, Layout::kNt, 16>", "Params"),
    ],
    "grouped_experts": [
        ("gate_up 128", "gate_up_sm80_kernel<bfloat16_t, 128>", "Params"),
        ("gate_up 16", "gate_up_sm80_kernel<bfloat16_t, 16>", "Params"),
        ("down 128", "rows_sm80_kernel<bfloat16_t, true, 128>", "RowsParams"),
        ("grad activation 128", "grad_activation_sm80_kernel<bfloat16_t, 128>", "BackwardParams"),
        ("grad down", "sums_sm80_kernel<bfloat16_t, true>", "SumsParams"),
        ("grad gate_up", "sums_sm80_kernel<bfloat16_t, false>", "SumsParams"),
        ("grad rows 128", "rows_sm80_kernel<bfloat16_t, false, 128>", "RowsParams"),
    ],
}
KERNELS = [(op, *kernel) for op, kernels in _OF_OP.items() for kernel in kernels]
YARDSTICK = ("CUTLASS", "grouped nt 128")
# The grouped kernel of CUTLASS 2.x with the tile, stages and instruction of ours.
CUTLASS_SOURCE = """
#include "cutlass/device_kernel.h"
#include "cutlass/epilogue/thread/linear_combination.h"
#include "cutlass/gemm/kernel/default_gemm_grouped.h"
#include "cutlass/gemm/kernel/gemm_grouped.h"
using Element = cutlass::bfloat16_t;
using cutlass::gemm::GemmShape;
using Kernel = cutlass::gemm::kernel::DefaultGemmGrouped<
    Element, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, 8, Element,
    cutlass::layout::ColumnMajor, cutlass::ComplexTransform::kNone, 8, Element,
    cutlass::layout::RowMajor, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
    GemmShape<128, 128, 32>, GemmShape<64, 64, 32>, GemmShape<16, 8, 16>,
    cutlass::epilogue::thread::LinearCombination<Element, 8, float, float>,
    cutlass::gemm::threadblock::GemmBatchedIdentityThreadblockSwizzle, 4>::GemmKernel;
template __global__ void cutlass::Kernel<Kernel>(Kernel::Params);
"""


class MissingToolError(RuntimeError):
    """A program that this needs is not there."""


def find_nvcc() -> str:
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if not nvcc:
        raise MissingToolError("nvcc is not on the PATH (and CUDACXX is not set)")
    return nvcc


def find_cuobjdump() -> str:
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        program = Path(folder) / "backends/nvidia/bin/cuobjdump"
        if os.access(program, os.X_OK):
            return str(program)
    raise MissingToolError("cuobjdump is neither on the PATH nor in an installed package triton")


def find_cutlass() -> Path | None:
    spec = importlib.util.find_spec("cutlass_library")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (include := Path(folder) / "source/include").is_dir():
            return include
    return None


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release \S+, V(\S+)", text)[1]


def source_of(op: str) -> str:
    lines = [f'#include "csrc/ops/{op}/kernel_sm80.cuh"', f"namespace mergeme::{op} {{"]
    lines += [f"template __global__ void {k}({params});" for _, k, params in _OF_OP[op]]
    return "\n".join([*lines, "}", ""])


def compile_units(nvcc: str, units: dict[str, tuple[str, list[str]]], arches, folder: Path):
    """Compiles {name: (source, flags)} for every architecture, as many at a time as there are CPUs.

    Returns (name, arch, ptxas' report, cubin) of each.
    """
    ccache = [found] if (found := shutil.which("ccache")) else []

    def run(job):
        name, arch = job
        source, cubin = folder / f"{name}.cu", folder / f"{name}.sm_{arch}.cubin"
        command = [*ccache, nvcc, *units[name][1], f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin"]
        command += ["-o", str(cubin), str(source)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"nvcc failed on {name} for sm_{arch}:\n{done.stderr}")
        return name, arch, done.stderr, cubin

    for name, (text, _) in units.items():
        (folder / f"{name}.cu").write_text(text)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(run, [(name, arch) for name in units for arch in arches])


def ptxas_figures(report: str) -> dict[str, dict[str, int]]:
    """Registers, stack and spilled bytes of every kernel, by mangled name."""
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    return {
        m[1]: {"registers": int(m[5]), "stack": int(m[2]), "spilled": int(m[3]) + int(m[4])}
        for m in re.finditer(pattern, report, re.S)
    }


def disassemble(cuobjdump: str, cubin: Path) -> dict[str, list[tuple[int, str]]]:
    """(address, instruction) lists of every kernel, by mangled name."""
    done = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"cuobjdump failed: {done.stderr}")
    kernels: dict[str, list[tuple[int, str]]] = {}
    for line in done.stdout.splitlines():
        if found := re.match(r"\s*Function : (\S+)", line):
            instructions = kernels.setdefault(found[1], [])
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            instructions.append((int(found[1], 16), found[2]))
    return kernels


def opcode(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def loop_figures(instructions: list[tuple[int, str]]) -> dict[str, int]:
    """Counts over the whole kernel and over its main loop.

    The main loop is the shortest stretch between a backward branch and its target that holds a
    tensor-core instruction.
    """
    everything = Counter(opcode(text) for _, text in instructions)
    main: list[str] = []
    for address, text in instructions:
        target = re.search(r"0x([0-9a-f]+)", text)
        if opcode(text) != "BRA" or not target or int(target[1], 16) >= address:
            continue
        body = [opcode(t) for a, t in instructions if int(target[1], 16) <= a <= address]
        if "HMMA" in body and (not main or len(body) < len(main)):
            main = body
    loop = Counter(main)
    return {
        "local": sum(everything[o] for o in ("LDL", "STL", "LD", "ST")),
        "instructions": len(instructions),
        "loop": len(main),
        "HMMA": loop["HMMA"],
        "LDSM": loop["LDSM"],
        "LDGSTS": loop["LDGSTS"],
    }


def measure(arches=ARCHES, cutlass: Path | None = None) -> dict:
    """The figures of every kernel in KERNELS, and of CUTLASS's where its headers are."""
    nvcc, cuobjdump = find_nvcc(), find_cuobjdump()
    units = {op: (source_of(op), [*FLAGS, "-I."]) for op in _OF_OP}
    if cutlass:
        flags = ["-std=c++17", "--expt-relaxed-constexpr", f"-I{cutlass}"]
        units["cutlass"] = (CUTLASS_SOURCE, flags)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for unit, arch, report, cubin in compile_units(nvcc, units, arches, Path(folder)):
            figures, listings = ptxas_figures(report), disassemble(cuobjdump, cubin)
            names = list(listings)
            readable = subprocess.run(
                ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
            ).stdout.split("\n")
            for mangled, name in zip(names, readable, strict=False):
                key = kernel_of(unit, name)
                if key is None:  # not one of the table's
                    continue
                row = {"op": key[0], "kernel": key[1], "arch": arch}
                rows.append(row | figures[mangled] | loop_figures(listings[mangled]))
    order = {key: i for i, key in enumerate([*(k[:2] for k in KERNELS), YARDSTICK])}
    rows.sort(key=lambda r: (r["arch"], order[r["op"], r["kernel"]]))
    return {"nvcc": nvcc_version(nvcc), "rows": rows}


def kernel_of(unit: str, readable: str) -> tuple[str, str] | None:
    if unit == "cutlass":
        return YARDSTICK
    layouts = {"Layout::kNt": 0, "Layout::kNn": 1, "Layout::kTn": 2}
    for name, kernel, _ in _OF_OP[unit]:
        for layout, number in layouts.items():
            kernel = kernel.replace(layout, f"(mergeme::grouped_matmul::Layout){number}")
        kernel = kernel.replace("bfloat16_t", "mergeme::bfloat16_t")
        if f"::{kernel}(" in readable:
            return unit, name
    return None


def read_table() -> dict:
    return json.loads(TABLE.read_text())


def markdown(table: dict) -> str:
    head = ("op", "kernel", "arch", "registers", "spilled bytes", "main loop", "HMMA", "LDSM")
    head += ("LDGSTS", "instructions per HMMA", "whole kernel")
    lines = ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    for r in table["rows"]:
        cells = (r["op"], r["kernel"], f"sm_{r['arch']}", r["registers"], r["spilled"], r["loop"])
        cells += (r["HMMA"], r["LDSM"], r["LDGSTS"], f"{r['loop'] / r['HMMA']:.2f}")
        lines.append("| " + " | ".join(map(str, (*cells, r["instructions"]))) + " |")
    return "\n".join([f"nvcc {table['nvcc']}:", "", *lines])


def write(table: dict) -> None:
    rows = ",\n".join("    " + json.dumps(row) for row in table["rows"])
    TABLE.write_text(f'{{\n  "nvcc": {json.dumps(table["nvcc"])},\n  "rows": [\n{rows}\n  ]\n}}\n')
    text, begin, end = README.read_text(), "<!-- sass: begin -->", "<!-- sass: end -->"
    before, rest = text.split(begin)
    README.write_text(f"{before}{begin}\n{markdown(table)}\n{end}{rest.split(end)[1]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table instead")
    parser.add_argument("--cutlass", type=Path, default=None, help="folder of CUTLASS's headers")
    args = parser.parse_args()
    try:
        table = measure(cutlass=args.cutlass or find_cutlass())
    except MissingToolError as error:
        print(f"sass: {error}", file=sys.stderr)
        return 2
    old = read_table() if TABLE.exists() else {"rows": []}
    if not any(r["op"] == YARDSTICK[0] for r in table["rows"]):
        print("sass: no CUTLASS headers; its rows stay as they were", file=sys.stderr)
        table["rows"] += [r for r in old["rows"] if r["op"] == YARDSTICK[0]]
        table["rows"].sort(key=lambda r: r["arch"])
    print(markdown(table))
    if args.write:
        write(table)
        return 0
    if table != old:
        print("sass: the figures differ from benchmarks/sass.json", file=sys.stderr)
    return int(table != old)


if __name__ == "__main__":
    sys.exit(main())

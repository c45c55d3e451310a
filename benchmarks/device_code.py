"""Compiles device code without a GPU and reads what came out: ptxas' report and SASS.

Needs nvcc, and cuobjdump from the CUDA toolkit or from the package triton.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

__all__ = [
    "FLAGS",
    "MMA",
    "Figures",
    "MissingToolError",
    "Unit",
    "built_ptx",
    "compile_units",
    "demangle",
    "disassemble",
    "figures_of",
    "find_cuobjdump",
    "find_nvcc",
    "nvcc_version",
    "opcode",
    "package_folder",
    "ptxas_figures",
    "ptxas_warnings",
]

ROOT = Path(__file__).parents[1]
# The flags of mergeme_device in CMakeLists.txt.
FLAGS = ("-std=c++20", "-fmad=false", "--extended-lambda", "--expt-relaxed-constexpr", "-I.")
# Tensor-core instructions.
MMA = ("HMMA", "HGMMA", "QGMMA")
_COUNTED = ("LDSM", "LDGSTS", "UTMALDG")


class MissingToolError(RuntimeError):
    """A program or a package that this needs is not there."""


@dataclass(frozen=True)
class Unit:
    """One source file, compiled for some architectures, such as "80" and "90a"."""

    name: str
    source: Path
    arches: tuple[str, ...]
    flags: tuple[str, ...] = FLAGS


@dataclass
class Figures:
    """What one kernel became."""

    registers: int = 0
    stack: int = 0
    spilled: int = 0  # bytes, stored and loaded
    shared: int = 0  # bytes, static
    warnings: list[str] = field(default_factory=list)  # of ptxas, about its performance
    local: int = 0  # loads and stores of local memory
    instructions: int = 0
    loop: int = 0  # instructions of the main loop
    mma: int = 0  # tensor-core instructions in it
    shape: str = ""  # of those, such as HMMA.16816 or HGMMA.64x256x16
    in_loop: dict[str, int] = field(default_factory=dict)  # some others of them
    opcodes: Counter = field(default_factory=Counter)  # of the whole kernel


def find_nvcc() -> str:
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if not nvcc:
        raise MissingToolError("nvcc is not on the PATH (and CUDACXX is not set)")
    return nvcc


def package_folder(package: str, inside: str) -> Path | None:
    """A folder or file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (found := Path(folder) / inside).exists():
            return found
    return None


def find_cuobjdump() -> str:
    if found := shutil.which("cuobjdump"):
        return found
    program = package_folder("triton", "backends/nvidia/bin/cuobjdump")
    if program and os.access(program, os.X_OK):
        return str(program)
    raise MissingToolError("cuobjdump is neither on the PATH nor in an installed package triton")


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release \S+, V(\S+)", text)[1]


def built_ptx(unit: Unit, arch: str) -> Path | None:
    """The PTX that the build made of one of our launchers, unless a source is newer.

    It saves the longer half of the compile; the build makes it with the same flags.
    """
    ptx = ROOT / f"mergeme_ext/_ptx/{unit.name}.sm_{arch}.ptx"
    if unit.source.parent.parent != ROOT / "csrc/ops" or not ptx.exists():
        return None
    folders = (unit.source.parent, ROOT / "csrc/common", ROOT / "csrc/simt")
    sources = [p for f in folders for p in f.iterdir() if p.suffix in (".h", ".cuh", ".cu")]
    return ptx if max(p.stat().st_mtime for p in sources) < ptx.stat().st_mtime else None


def compile_units(
    nvcc: str, units: Sequence[Unit], folder: Path
) -> Iterator[tuple[Unit, str, str, Path]]:
    """Compiles units, as many at a time as there are CPUs, through ccache where that is found.

    Yields (unit, architecture, ptxas' report, object file) of each.
    """
    ccache = [found] if (found := shutil.which("ccache")) else []

    def run(job: tuple[Unit, str]) -> tuple[Unit, str, str, Path]:
        unit, arch = job
        made = folder / f"{unit.name}.sm_{arch}.o"
        if ptx := built_ptx(unit, arch):
            command = [nvcc, f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin", "-o", str(made), str(ptx)]
        else:
            # An object file for this architecture alone: ccache keeps those, not cubins.
            code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
            command = [*ccache, nvcc, *unit.flags, code, "-Xptxas=-v", "-c"]
            command += ["-o", str(made), str(unit.source)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"nvcc failed on {unit.name} for sm_{arch}:\n{done.stderr}")
        return unit, arch, done.stderr, made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(run, [(unit, arch) for unit in units for arch in unit.arches])


def ptxas_figures(report: str) -> dict[str, dict[str, int]]:
    """Registers, stack, spilled bytes and static shared memory of every kernel, by mangled name."""
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    return {
        m[1]: {
            "registers": int(m[5]),
            "stack": int(m[2]),
            "spilled": int(m[3]) + int(m[4]),
            "shared": int(shared[1]) if (shared := re.search(r"(\d+) bytes smem", m[6])) else 0,
        }
        for m in re.finditer(pattern, report, re.S)
    }


def ptxas_warnings(report: str) -> list[tuple[str, str]]:
    """(code, line) of ptxas' remarks on wgmma and setmaxnreg, which it may serialise or ignore."""
    return [(m[1], m[0]) for m in re.finditer(r"^.*\((C75\d\d)\).*$", report, re.M)]


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


def demangle(names: Sequence[str]) -> list[str]:
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return done.stdout.split("\n")[: len(names)]


def _word(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def opcode(instruction: str) -> str:
    """HMMA of "@P0 HMMA.16816.F32.BF16 R4, R132.reuse, R136, R4"."""
    return _word(instruction).split(".")[0]


def _main_loop(instructions: list[tuple[int, str]]) -> list[str]:
    """The stretch from a backward branch's target to it with the fewest instructions per MMA.

    In warp-specialised kernels that is the loop of the math warps. What a wait does when it has to
    wait, a loop of its own behind the kernel's end and a branch back, is no part of it.
    """
    main: list[str] = []
    most = 0.0  # MMA per instruction
    retried = False
    for address, text in instructions:
        target = re.search(r"0x([0-9a-f]+)", text)
        if opcode(text) != "BRA" or not target or int(target[1], 16) >= address:
            retried = False
            continue
        body = [t for a, t in instructions if int(target[1], 16) <= a <= address]
        share = sum(opcode(t) in MMA for t in body) / len(body)
        if share > most and not retried:
            main, most = body, share
        retried = len(body) < 8 and any(opcode(t) == "SYNCS" for t in body)
    return main


def loop_figures(instructions: list[tuple[int, str]]) -> Figures:
    """Counts over the whole kernel and over its main loop."""
    everything = Counter(opcode(text) for _, text in instructions)
    main = _main_loop(instructions)
    loop = Counter(map(opcode, main))
    shapes = Counter(".".join(_word(t).split(".")[:2]) for t in main if opcode(t) in MMA)
    return Figures(
        local=everything["LDL"] + everything["STL"],
        instructions=len(instructions),
        loop=len(main),
        mma=sum(loop[o] for o in MMA),
        shape=" ".join(sorted(shapes)),
        in_loop={o: loop[o] for o in _COUNTED if loop[o]},
        opcodes=everything,
    )


def figures_of(cuobjdump: str, report: str, cubin: Path) -> dict[str, Figures]:
    """The figures of every kernel of a cubin, by readable name."""
    listings, compiled = disassemble(cuobjdump, cubin), ptxas_figures(report)
    warnings = ptxas_warnings(report)
    found = {}
    for mangled, readable in zip(listings, demangle(list(listings)), strict=True):
        if mangled not in compiled:  # a function that kernels call
            continue
        figures = loop_figures(listings[mangled])
        for name, value in compiled[mangled].items():
            setattr(figures, name, value)
        # A remark that names no kernel of the file is held against all of them.
        figures.warnings = [
            code
            for code, line in warnings
            if mangled in line or not any(k in line for k in listings)
        ]
        found[readable] = figures
    return found

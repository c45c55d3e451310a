"""What nvcc makes of all kernels: registers, spills, instructions, the tensor-core kernels' loop.

    python -m benchmarks.sass                            # compile, compare with sass.json
    python -m benchmarks.sass --write                    # compile, write it and README's tables
    python -m benchmarks.sass --cutlass DIR --deep-gemm DIR    # headers, if not of packages

Needs nvcc, and cuobjdump from the CUDA toolkit or from the package triton. No GPU.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from benchmarks.device_code import (
    ROOT,
    Figures,
    MissingToolError,
    Unit,
    compile_units,
    figures_of,
    find_cuobjdump,
    find_nvcc,
    nvcc_version,
)
from benchmarks.yardsticks import CUTLASS, DEEP_GEMM, YARDSTICKS, find_headers
from benchmarks.yardsticks import units as yardstick_units

TABLE = ROOT / "benchmarks/sass.json"
README = ROOT / "benchmarks/README.md"
ARCHES = ("80", "90a")
# A figure may be this much larger than in the table.
GROWTH = 1.1
# Instructions of the main loop per tensor-core instruction, as a multiple of the yardstick's.
PARITY = 1.25
_DTYPES = r"(?:mergeme::)?(?:bfloat16_t|float16_t|float8_e4m3_t|float|double|half)"
_LAYOUTS = ("nt", "nn", "tn")
# Copies of boxes and of chunks, stores of fragments, register budgets.
_OF_HOPPER = ("UTMALDG", "LDGSTS", "STSM", "USETMAXREG")
# Multiply-adds of a warpgroup's m64n256k16, by which instructions of other shapes are counted.
_UNIT = 64 * 256 * 16


def _without_parameters(function: str) -> str:
    depth = 0
    for i, c in enumerate(function):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return function[:i]
    return function


def _shape(found: re.Match) -> str:
    rows, columns, groups, cluster = found.groups()
    together = f", cluster of {cluster}" if cluster not in (None, "1") else ""
    return f"{rows}x{columns}, {groups} groups{together}"


def kernel_name(readable: str) -> tuple[str, str]:
    """(name, its dtypes) of a demangled kernel: what is left is the variant, whatever the dtype.

    "void mergeme::a::b_kernel<mergeme::float16_t, (mergeme::a::Layout)0, 128>(...)" is
    ("b_kernel<nt, 128>", "float16_t"). A Shape<64, 256, 1, 1> is "64x256, 1 groups": the tile, and
    how many warpgroups share it; the last is the blocks of a cluster.
    """
    text = _without_parameters(re.sub(r"^void ", "", readable))
    text = re.sub(r"\([\w:]*Layout\)(\d)", lambda m: _LAYOUTS[int(m[1])], text)
    text = re.sub(r"\((?:[\w:]|\(anonymous namespace\))+\)(-?\d+)", r"\1", text)
    text = re.sub(r"[\w:]*\bShape<(\d+), (\d+), (\d+)(?:, (\d+))?> ?", _shape, text)
    head, _, rest = text.partition("<")
    dtypes = re.findall(_DTYPES, rest)
    rest = re.sub(rf"{_DTYPES}(?:, )?", "", rest).strip(" ,>")
    rest = rest.replace("(bool)", "").replace("mergeme::", "")
    name = head.split("::")[-1]
    return (f"{name}<{rest}>" if rest else name), " ".join(d.split("::")[-1] for d in dtypes)


def equivalents(shape: str, count: int) -> float:
    """Tensor-core instructions in units of m64n256k16: by multiply-adds."""
    kind, _, size = shape.partition(".")
    if kind == "HMMA":
        m, n, k = 16, 8, int(size[-2:]) if size.endswith("16") else 8
    else:
        m, n, k = map(int, size.split("x"))
    return count * m * n * k / _UNIT


def _loop_row(op: str, kernel: str, arch: str, f: Figures) -> dict:
    row = {"op": op, "kernel": kernel, "arch": arch, "registers": f.registers, "stack": f.stack}
    row |= {"spilled": f.spilled, "local": f.local, "warnings": sorted(set(f.warnings))}
    row |= {"instructions": f.instructions, "loop": f.loop, "shape": f.shape, "mma": f.mma}
    if "GMMA" in f.shape:  # copies and stores are other warps' or behind the loop
        row["whole"] = {o: f.opcodes[o] for o in _OF_HOPPER}
    return row | f.in_loop


def _family_row(op: str, kernel: str, arch: str, all_figures: list[Figures]) -> dict:
    """One row for all dtypes of a kernel: sums of what must be zero, the largest of the rest."""
    row = {"op": op, "kernel": kernel, "arch": arch, "variants": len(all_figures)}
    for name in ("stack", "spilled", "local"):
        row[name] = sum(getattr(f, name) for f in all_figures)
    for name in ("registers", "shared", "instructions"):
        row[name] = max(getattr(f, name) for f in all_figures)
    return row


def ours(arches: Iterable[str] = ARCHES, ops: Iterable[str] | None = None) -> list[Unit]:
    """Every launcher, or those of some ops."""
    names = ops or sorted(p.parent.name for p in (ROOT / "csrc/ops").glob("*/launch.cu"))
    return [Unit(op, ROOT / f"csrc/ops/{op}/launch.cu", tuple(arches)) for op in names]


def measure(headers: dict[str, Path], arches=ARCHES, ops: Iterable[str] | None = None) -> dict:
    """The figures of all our kernels, and of the yardsticks whose headers are at hand."""
    nvcc, cuobjdump = find_nvcc(), find_cuobjdump()
    theirs = yardstick_units(headers)
    loops, families = [], []
    with tempfile.TemporaryDirectory() as folder:
        units = [*ours(arches, ops), *theirs]
        for unit, arch, report, cubin in compile_units(nvcc, units, Path(folder)):
            kernels = figures_of(cuobjdump, report, cubin)
            if unit in theirs:
                (figures,) = kernels.values()
                loops.append(_loop_row(theirs[unit].library, theirs[unit].name, arch, figures))
                continue
            by_name: dict[str, list[Figures]] = {}
            for readable, figures in kernels.items():
                by_name.setdefault(kernel_name(readable)[0], []).append(figures)
            for name, same in sorted(by_name.items()):
                families.append(_family_row(unit.name, name, arch, same))
                # Of the dtypes, the one with the longest loop stands for all.
                longest = max(same, key=lambda f: (f.loop, f.registers))
                if longest.mma:
                    loops.append(_loop_row(unit.name, name, arch, longest))
    for rows in (loops, families):
        rows.sort(key=lambda r: (ARCHES.index(r["arch"]), r["op"] in (CUTLASS, DEEP_GEMM)))
    return {"nvcc": nvcc_version(nvcc), "loops": loops, "kernels": families}


def read_table() -> dict:
    return json.loads(TABLE.read_text())


def key(row: dict) -> tuple[str, str, str]:
    return row["op"], row["kernel"], row["arch"]


def yardstick_of(row: dict, table: dict) -> dict | None:
    """The yardstick's row that a kernel's main loop is held to, or None.

    That is the one with the same instruction, else the one of its kind with the next smaller
    (else the smallest) one, compared by multiply-adds. On sm_80 only tiles of 64 or 128 rows have
    one: those of fewer rows multiply each fragment of the weights fewer times.
    """
    library = CUTLASS if row["shape"].startswith("HMMA") else DEEP_GEMM
    if library == CUTLASS and row["mma"] < 64:
        return None
    kind = row["shape"].split(".")[0]
    same = [
        r
        for r in table["loops"]
        if r["op"] == library and r["arch"] == row["arch"] and r["shape"].split(".")[0] == kind
    ]
    size = equivalents(row["shape"], 1)
    same.sort(key=lambda r: equivalents(r["shape"], 1))
    fitting = [r for r in same if equivalents(r["shape"], 1) <= size]
    return (fitting or same[::-1] or [None])[-1]


def ratio_to_yardstick(row: dict, table: dict) -> float | None:
    """Main-loop instructions per multiply-add, relative to the yardstick's; None without one."""
    their = yardstick_of(row, table)
    if their is None or row["op"] == their["op"]:
        return None
    each, theirs = (r["loop"] / equivalents(r["shape"], r["mma"]) for r in (row, their))
    return each / theirs


def _is_ours(row: dict) -> bool:
    return row["op"] not in (CUTLASS, DEEP_GEMM)


def _called(row: dict) -> str:
    return f"{row['op']} {row['kernel']} sm_{row['arch']}"


def complaints(new: dict, old: dict) -> list[str]:
    """What is worse in ``new`` than in the table ``old``, or forbidden anyway; one line each.

    Spills are forbidden, and in tensor-core kernels any stack. Elsewhere a stack is where a device
    assert lays out its message; it may not grow.
    """
    found = []
    figures = {"kernels": ("stack", "local", "registers", "shared", "instructions")}
    figures["loops"] = ("loop", "registers", "instructions")
    for part, compared in figures.items():
        before = {key(r): r for r in old[part]}
        for row in filter(_is_ours, new[part]):
            if row["spilled"]:
                found.append(f"{_called(row)}: {row['spilled']} bytes spilled")
            if key(row) not in before:
                found.append(f"{_called(row)}: not in {TABLE.name} ({part})")
                continue
            for what in compared:
                if row[what] > GROWTH * before[key(row)][what]:
                    found.append(
                        f"{_called(row)}: {what} {row[what]}, was {before[key(row)][what]}"
                    )
    for row in filter(_is_ours, new["loops"]):
        if row["stack"] or row["local"]:
            found.append(f"{_called(row)}: {row['stack']} bytes of stack, {row['local']} local")
        if row["warnings"]:
            found.append(f"{_called(row)}: ptxas remarks {' '.join(row['warnings'])}")
        # Without headers the yardsticks are the table's.
        ratio = ratio_to_yardstick(row, {"loops": [*new["loops"], *old["loops"]]})
        if ratio is not None and ratio > PARITY:
            found.append(
                f"{_called(row)}: main loop {ratio:.2f} x the yardstick's, at most {PARITY}"
            )
    return found


def _lines(head: tuple[str, ...], rows: Iterable[tuple], words: int) -> list[str]:
    lines = ["| " + " | ".join(head) + " |"]
    lines.append("|" + " --- |" * words + " ---: |" * (len(head) - words))
    return lines + ["| " + " | ".join(map(str, r)) + " |" for r in rows]


def loops_markdown(table: dict) -> str:
    """The main loops, with the yardsticks' below those of each architecture."""
    head = ("op", "kernel", "arch", "instruction", "registers", "spilled bytes", "main loop")
    head += (
        "MMA",
        "LDSM",
        "LDGSTS",
        "UTMALDG",
        "per MMA",
        "per m64n256k16",
        "x yardstick",
        "whole kernel",
    )
    rows = []
    for r in table["loops"]:
        if r["arch"] != "80" and _is_ours(r) and r["shape"].startswith("HMMA"):
            continue  # the kernels for sm_80, once more
        ratio = ratio_to_yardstick(r, table)
        cells = (r["op"], r["kernel"], f"sm_{r['arch']}", r["shape"], r["registers"], r["spilled"])
        copies = r.get("whole", r)  # of warps of their own, if any
        cells += (r["loop"], r["mma"], r.get("LDSM", 0))
        cells += (copies.get("LDGSTS", 0), copies.get("UTMALDG", 0))
        cells += (f"{r['loop'] / r['mma']:.2f}",)
        cells += (f"{r['loop'] / equivalents(r['shape'], r['mma']):.1f}",)
        rows.append((*cells, "" if ratio is None else f"{ratio:.2f}", r["instructions"]))
    return "\n".join([f"nvcc {table['nvcc']}:", "", *_lines(head, rows, 4)])


def kernels_markdown(table: dict) -> str:
    """All kernels; the figures of both architectures side by side."""
    head = ("op", "kernel", "dtypes", "registers", "spills and stack", "static shared", "local")
    head += ("instructions",)
    merged: dict[tuple, dict[str, dict]] = {}
    for r in table["kernels"]:
        merged.setdefault(key(r)[:2], {})[r["arch"]] = r

    def both(row: dict[str, dict], *names: str) -> str:
        values = [str(sum(r[n] for n in names)) for a in ARCHES if (r := row.get(a))]
        return values[0] if len(set(values)) == 1 else " / ".join(values)

    rows = [
        (
            *name,
            both(row, "variants"),
            both(row, "registers"),
            both(row, "spilled", "stack"),
            both(row, "shared"),
            both(row, "local"),
            both(row, "instructions"),
        )
        for name, row in sorted(merged.items())
    ]
    return "\n".join(_lines(head, rows, 2))


def _between(text: str, name: str, content: str) -> str:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def write(table: dict) -> None:
    parts = []
    for part in ("loops", "kernels"):
        rows = ",\n".join("    " + json.dumps(row) for row in table[part])
        parts.append(f'  "{part}": [\n{rows}\n  ]')
    body = ",\n".join([f'  "nvcc": {json.dumps(table["nvcc"])}', *parts])
    TABLE.write_text(f"{{\n{body}\n}}\n")
    text = _between(README.read_text(), "sass", loops_markdown(table))
    README.write_text(_between(text, "sass kernels", kernels_markdown(table)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the tables instead")
    parser.add_argument("--cutlass", type=Path, help="folder of CUTLASS's headers")
    parser.add_argument("--deep-gemm", type=Path, help="folder of DeepGEMM's headers")
    args = parser.parse_args()
    given = {CUTLASS: args.cutlass, DEEP_GEMM: args.deep_gemm}
    headers = find_headers() | {k: v.resolve() for k, v in given.items() if v}
    try:
        table = measure(headers)
    except MissingToolError as error:
        print(f"sass: {error}", file=sys.stderr)
        return 2
    old = read_table() if TABLE.exists() else {"loops": [], "kernels": []}
    for library in {y.library for y in YARDSTICKS} - set(headers):
        print(f"sass: no headers of {library}; its rows stay as they were", file=sys.stderr)
        table["loops"] += [r for r in old.get("loops", []) if r["op"] == library]
    table["loops"].sort(key=lambda r: (ARCHES.index(r["arch"]), r["op"] in (CUTLASS, DEEP_GEMM)))
    if args.write:
        write(table)
        old = table
    print(loops_markdown(table))
    wrong = complaints(table, old)
    for line in wrong:
        print(f"sass: {line}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

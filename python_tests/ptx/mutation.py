"""Kernels with one synchronising instruction deleted or weakened: does anything notice?

A kernel that is right only by luck of the order its threads run in passes every other test. Here
each barrier, wait, fence, commit and arrival is taken out in turn, and the interpreter runs what is
left, under several schedules. A mutant is noticed if the interpreter stops, finds a hazard, or the
results are other bits. What is not noticed is either redundant, and then it costs time for nothing,
or it is kept for a reason that no run on this interpreter can show: mutations.json gives it.

    python -m python_tests.ptx.mutation            # run all, print
    python -m python_tests.ptx.mutation --write    # write it and the table in README.md
    python -m python_tests.ptx.mutation OP ...     # of some ops only
"""

import argparse
import ctypes
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from python_tests.ptx.text import Instruction, Kernel, kernels
from python_tests.support import ptx

SEEDS = (0, 1, 2, 3)
SECONDS = 20  # for a launch: a mutant may spin
TABLE = Path(__file__).with_name("mutations.json")
README = Path(__file__).with_name("README.md")
_SYNCHRONISING = re.compile(
    r"bar\.(sync|arrive|red|warp\.sync)|barrier\.|cp\.async\.(wait|commit|mbarrier|bulk\.(wait|commit))"
    r"|mbarrier\.(init|inval|arrive|expect_tx|complete_tx|try_wait|test_wait)|wgmma\.(fence|commit|wait)"
    r"|membar|fence"
)


@dataclass(frozen=True)
class Mutant:
    change: str  # "delete bar.sync", "weaken cp.async.wait_group 2 to 3"
    instruction: Instruction
    kernel: Kernel


@dataclass(frozen=True)
class Call:
    """One call of an op: tensors from the namespace of a backend, e.g. torch.ops.mergeme_ptx80."""

    run: Callable[..., tuple[torch.Tensor, ...]]
    max_grid: int = 0  # see ptx.small_grids()
    kernel: str = ""  # a part of the name of one that needs this call in any case


@dataclass(frozen=True)
class Finding:
    """A mutant that nothing noticed, or several: copies that the compiler made of one line."""

    change: str
    file: str
    source: str  # the line, which stays when its number does not
    copies: int

    def key(self):
        return self.change, self.file, self.source


def is_synchronising(instruction: Instruction) -> bool:
    return _SYNCHRONISING.match(instruction.opcode) is not None


def _deleted(i: Instruction) -> str:
    if "try_wait" in i.opcode or "test_wait" in i.opcode:  # as if the phase had ended
        return f"setp.eq.u32 {i.operands.split(',')[0]}, 0, 0;"
    if i.opcode.startswith("mbarrier.arrive") and not i.operands.startswith(("_", "[")):
        return f"mov.b64 {i.operands.split(',')[0]}, 0;"
    return ""


def _weakened(i: Instruction) -> tuple[str, str] | None:
    """What the instruction becomes and how to say so; None if it can only be deleted."""
    if re.match(r"(cp\.async|wgmma|cp\.async\.bulk)\.wait_group", i.opcode):
        left = int(i.operands)
        return f"{i.opcode} {left + 1};", f"weaken {i.opcode} {left} to {left + 1}"
    if i.opcode == "cp.async.wait_all":
        return "cp.async.wait_group 1;", f"weaken {i.opcode} to wait_group 1"
    if i.opcode == "bar.sync" and "," not in i.operands:
        return "bar.warp.sync -1;", f"weaken {i.opcode} to bar.warp.sync"
    if ".try_wait.parity" in i.opcode:
        result, barrier, parity, *rest = (x.strip() for x in i.operands.split(","))
        wait = ", ".join([result, barrier, "mutant_parity", *rest])
        text = f"xor.b32 mutant_parity, {parity}, 1; {i.guard}{i.opcode} {wait};"
        return f"{{ .reg .b32 mutant_parity; {text} }}", f"weaken {i.opcode} to the other phase"
    if ".expect_tx" in i.opcode and ".arrive" in i.opcode:
        operands = i.operands.rsplit(",", 1)[0]
        return f"{i.opcode.replace('.expect_tx', '')} {operands};", f"weaken {i.opcode} to arrive"
    return None


def mutants(kernel: Kernel, warps: int, lines_run: set[int]) -> Iterator[Mutant]:
    """Every deletion and weakening of a kernel whose blocks have so many warps.

    Of the instructions on ``lines_run``, numbered as in the file.
    """

    def mutant(i: Instruction, replacement: str, change: str) -> Mutant:
        lines = list(kernel.lines)
        whole = re.compile(re.escape(i.opcode) + r"\s*" + re.escape(i.operands) + r"\s*;")
        guard = "" if not replacement or replacement.startswith("{") else i.guard
        start = lines[i.line].index(i.opcode)
        assert whole.match(lines[i.line], start), lines[i.line]
        lines[i.line] = guard + replacement + whole.sub("", lines[i.line][start:], count=1)
        return Mutant(change, i, replace(kernel, lines=lines))

    for i in kernel.instructions:
        if not is_synchronising(i) or kernel.first + i.line not in lines_run:
            continue
        yield mutant(i, _deleted(i), f"delete {i.opcode}")
        weaker = _weakened(i)
        if weaker and not (i.opcode == "bar.sync" and warps == 1):
            yield mutant(i, *weaker)


@cache
def demangle(name: str) -> str:
    function = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    function.restype = ctypes.c_void_p
    text = function(name.encode(), None, None, None)
    return ctypes.string_at(text).decode() if text else name


def short_name(kernel: str) -> str:
    """A demangled kernel's name without namespaces and parameters."""
    name = kernel.removeprefix("void ").removesuffix(")").rsplit("(", 1)[0]
    name = re.sub(r"\((?:[\w:]+)\)", "", name)  # the types of constants
    return re.sub(r"\b\w+::", "", name)


def _bits(tensors) -> list[torch.Tensor]:
    return [t.detach().clone().contiguous().reshape(-1).view(torch.uint8) for t in tensors]


class Subject:
    """An op's kernels on an architecture, and the calls that run them."""

    def __init__(self, op: str, backend: str, calls: list[Call]):
        self.op, self.architecture = op, ptx.ARCHITECTURES[backend]
        self._ops = getattr(torch.ops, f"mergeme_{backend}")
        found = kernels(ptx.text_of(op, self.architecture))
        self._calls, self._right = calls, []
        self._callers: dict[str, list[int]] = {}  # of a kernel, by its mangled name
        self._warps: dict[str, int] = {}
        self._lines: dict[str, set[int]] = {}
        mangled = {demangle(name): name for name in found}
        costs, reached = [], []
        for call in calls:
            with ptx.recording(seeds=SEEDS[:1], profile=True) as launches:
                self._right.append(_bits(self._run(call, SEEDS[0])))
            costs.append(sum(launch.statistics["warp_instructions"] for launch in launches))
            reached.append({})
            for launch in launches:
                if name := mangled.get(launch.kernel):  # else of another op's file
                    x, y, z = launch.block
                    self._warps[name] = (x * y * z + 31) // 32
                    lines = {line for line, *_ in launch.statistics["profile"]}
                    reached[-1].setdefault(name, set()).update(lines)
        for number in sorted(range(len(calls)), key=costs.__getitem__):
            for name, lines in reached[number].items():
                known = self._lines.setdefault(name, set())
                wanted = calls[number].kernel and calls[number].kernel in name
                if lines - known or wanted or len(self._callers[name]) < 3:
                    self._callers.setdefault(name, []).append(number)
                    known |= lines
        self.kernels = {name: found[name] for name in self._callers}

    def _run(self, call: Call, seed: int):
        with ptx.seeds(seed), ptx.small_grids(call.max_grid), ptx.time_limit(SECONDS):
            return call.run(self._ops)

    def _text(self, kernel: Kernel) -> str:
        bodies = ({**self.kernels, kernel.name: kernel}[name].lines for name in self.kernels)
        return "\n".join([*kernel.before, *(line for body in bodies for line in body), ""])

    def mutants(self, name: str) -> list[Mutant]:
        return list(mutants(self.kernels[name], self._warps[name], self._lines[name]))

    def never_run(self, name: str) -> list[Instruction]:
        """Synchronising instructions that no call reaches."""
        kernel, lines = self.kernels[name], self._lines[name]
        return [
            i
            for i in kernel.instructions
            if is_synchronising(i) and kernel.first + i.line not in lines
        ]

    def how_noticed(self, kernel: Kernel) -> str | None:
        """How a kernel's mutant is noticed: "stopped", "hazard", "wrong", or not at all: None."""
        ptx.Module(kernel.text())  # a mutant that cannot be read is a mistake of ours
        with ptx.override(self.op, self.architecture, self._text(kernel)):
            for seed in SEEDS:
                for number in self._callers[kernel.name]:
                    try:
                        out = _bits(self._run(self._calls[number], seed))
                    except RuntimeError as error:
                        return "hazard" if "hazard" in str(error) else "stopped"
                    if not all(map(torch.equal, out, self._right[number])):
                        return "wrong"
        return None


def examine(subject: Subject, name: str, chosen: Callable[[int], bool] = lambda _: True):
    """Counts of how a kernel's mutants were noticed, and the findings."""
    counts, missed = Counter(), Counter()
    for number, mutant in enumerate(subject.mutants(name)):
        if not chosen(number):
            continue
        how = subject.how_noticed(mutant.kernel)
        counts[how or "unnoticed"] += 1
        if how is None:
            i = mutant.instruction
            missed[mutant.change, i.place.rsplit(":", 1)[0], i.source] += 1
    return counts, [Finding(*key, copies) for key, copies in sorted(missed.items())]


def read_table() -> dict:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {"rows": []}


def key_of(row: dict) -> tuple[str, str, str]:
    return row["op"], row["kernel"], row["architecture"]


def row_of(subject: Subject, name: str) -> dict:
    counts, findings = examine(subject, name)
    reached = Counter(
        (i.opcode, i.place.rsplit(":", 1)[0], i.source) for i in subject.never_run(name)
    )
    return {
        "op": subject.op,
        "kernel": short_name(demangle(name)),
        "architecture": subject.architecture,
        "mutants": counts.total(),
        **{how: counts[how] for how in ("stopped", "hazard", "wrong")},
        "unnoticed": [vars(f) for f in findings],
        "never_run": [
            {"opcode": o, "file": f, "source": s, "copies": n}
            for (o, f, s), n in sorted(reached.items())
        ],
    }


def with_reasons(row: dict, old: dict) -> dict:
    """The row with the reasons that an old table gave for the same findings of its op."""
    alike = [r for r in old["rows"] if r["op"] == row["op"]]
    alike.sort(key=lambda r: key_of(r) == key_of(row))  # its own last, so that they count
    for kind in ("unnoticed", "never_run"):
        reasons = {finding_key(f): f.get("reason", "") for r in alike for f in r[kind]}
        for finding in row[kind]:
            finding["reason"] = reasons.get(finding_key(finding), "")
    return row


def finding_key(finding: dict):
    return finding.get("change") or finding["opcode"], finding["file"], finding["source"]


def markdown(table: dict) -> str:
    lines = [
        "| op | kernel | arch | mutants | stopped | hazard | wrong | noticed | explained |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in table["rows"]:
        noticed = r["stopped"] + r["hazard"] + r["wrong"]
        share = f"{noticed / r['mutants']:.0%}" if r["mutants"] else ""
        cells = [r["op"], f"`{r['kernel']}`", r["architecture"], r["mutants"], r["stopped"]]
        cells += [r["hazard"], r["wrong"], share, r["mutants"] - noticed]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def measure(ops: list[str], backend: str = "ptx80", kernel: str = "") -> Iterator[dict]:
    """Rows of the table, one for each kernel of that name that synchronises anything."""
    from python_tests.ptx.mutation_calls import CALLS  # it needs Call

    for op in ops:
        subject = Subject(op, backend, list(CALLS[op]()))
        for name in sorted(subject.kernels, key=demangle):
            if kernel in short_name(demangle(name)) and subject.mutants(name):
                yield row_of(subject, name)


def main(argv=None) -> int:
    from python_tests.ptx.mutation_calls import CALLS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="csrc/ops/OP (all)")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--backend", choices=sorted(ptx.ARCHITECTURES), default="ptx80")
    parser.add_argument("--kernel", default="", help="a part of its name (all)")
    options = parser.parse_args(argv)
    old = read_table()
    rows = {key_of(r): r for r in old["rows"]}
    for row in measure(options.ops or sorted(CALLS), options.backend, options.kernel):
        row = with_reasons(row, old)
        rows[key_of(row)] = row
        print(json.dumps(row, indent=1), flush=True)
        if options.write:
            table = {"rows": [rows[key] for key in sorted(rows)]}
            TABLE.write_text(json.dumps(table, indent=1) + "\n")
            text = re.sub(r"(?s)\| op \| kernel .*\|\n", markdown(table) + "\n", README.read_text())
            README.write_text(text)
    print(markdown({"rows": [rows[key] for key in sorted(rows)]}))
    return 0


if __name__ == "__main__":
    from python_tests.ptx import mutation

    sys.exit(mutation.main())

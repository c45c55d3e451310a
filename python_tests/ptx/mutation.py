"""Kernels with one synchronising instruction deleted or weakened: does anything notice?

A kernel that is right only by luck of the order its threads run in passes every other test. Here
each barrier, wait, fence, commit and arrival is taken out in turn, and the interpreter runs what is
left, under several schedules. A mutant is noticed if the interpreter stops, records a hazard, or
the results are wrong. What is not noticed is either redundant, and then it costs time for nothing,
or it is kept for a reason that no run on this interpreter can show; mutations.json names each with
its reason.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from python_tests.ptx.text import Instruction, Kernel

SEEDS = (0, 1, 2, 3)
_SYNCHRONISING = re.compile(
    r"bar\.(sync|arrive|red|warp\.sync)|barrier\.|cp\.async\.(wait|commit|mbarrier|bulk\.(wait|commit))"
    r"|mbarrier\.(init|inval|arrive|expect_tx|complete_tx|try_wait|test_wait)|wgmma\.(fence|commit|wait)"
    r"|membar|fence"
)


@dataclass(frozen=True)
class Mutant:
    change: str  # "delete bar.sync", "weaken cp.async.wait_group 2 to 3"
    instruction: Instruction
    text: str  # a PTX file with the one changed kernel

    def __str__(self):
        return f"{self.change} at {self.instruction.place}"


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
        wait = ", ".join([result, barrier, "mergeme_parity", *rest])
        text = f"xor.b32 mergeme_parity, {parity}, 1; {i.guard}{i.opcode} {wait};"
        return f"{{ .reg .b32 mergeme_parity; {text} }}", f"weaken {i.opcode} to the other phase"
    if ".expect_tx" in i.opcode and ".arrive" in i.opcode:
        operands = i.operands.rsplit(",", 1)[0]
        return f"{i.opcode.replace('.expect_tx', '')} {operands};", f"weaken {i.opcode} to arrive"
    return None


def mutants(kernel: Kernel, warps: int, is_run: Callable[[Instruction], bool]) -> Iterator[Mutant]:
    """Every deletion and weakening of a kernel whose blocks have so many warps."""

    def mutant(i: Instruction, replacement: str, change: str) -> Mutant:
        lines = list(kernel.lines)
        whole = re.compile(re.escape(i.opcode) + r"\s*" + re.escape(i.operands) + r"\s*;")
        start = lines[i.line].index(i.opcode)
        assert whole.match(lines[i.line], start), lines[i.line]
        guarded = (
            replacement if replacement.startswith("{") or not replacement else i.guard + replacement
        )
        lines[i.line] = guarded + whole.sub("", lines[i.line][start:], count=1)
        return Mutant(change, i, kernel.text(lines))

    for i in kernel.instructions:
        if not is_synchronising(i) or not is_run(i):
            continue
        yield mutant(i, _deleted(i), f"delete {i.opcode}")
        weaker = _weakened(i)
        if weaker and not (i.opcode == "bar.sync" and warps == 1):
            yield mutant(i, *weaker)


@dataclass(frozen=True)
class Outcome:
    right: bool
    hazards: int


def how_noticed(run: Callable[[str, int], Outcome], mutant: Mutant) -> str | None:
    """How a mutant is noticed: "stopped", "hazard" or "wrong"; None if it is not."""
    for seed in SEEDS:
        try:
            outcome = run(mutant.text, seed)
        except RuntimeError:
            return "stopped"
        if outcome.hazards:
            return "hazard"
        if not outcome.right:
            return "wrong"
    return None

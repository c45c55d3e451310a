"""PTX as text: one kernel of a file, its instructions, and the source lines they come from."""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
_ENTRY = re.compile(r"^\s*(?:\.visible |\.weak )*\.entry (\S+?)\(")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"')
_LOC = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)\s+\d+(?:.*inlined_at\s+(\d+)\s+(\d+))?")
_INSTRUCTION = re.compile(r"^\s*(?:@!?(%?\w+)\s+)?([a-z][\w.:]*)\s*([^;]*);")


@dataclass(frozen=True)
class Instruction:
    line: int  # of the kernel's own lines, from 0
    guard: str  # "@%p1 " or ""
    opcode: str
    operands: str
    place: str  # "csrc/x.cuh:12", the innermost line of source that is not a wrapper of csrc/simt
    source: str  # what stands there


@dataclass
class Kernel:
    name: str  # mangled
    first: int  # the line of the file, from 1, that it begins with
    before: list[str]  # the file's lines that every kernel shares
    lines: list[str]
    instructions: list[Instruction] = field(default_factory=list)

    def text(self) -> str:
        """A PTX file that holds this kernel alone."""
        return "\n".join([*self.before, *self.lines, ""])


@cache
def _source_lines(path: str) -> tuple[str, ...]:
    file = ROOT / path
    return tuple(file.read_text().splitlines()) if file.is_file() else ()


class _Places:
    """Follows .loc lines; knows for the current instruction where it was written."""

    def __init__(self, files: dict[int, str]):
        self._files = files
        self._callers: dict[tuple[int, int], tuple[int, int] | None] = {}
        self._at: tuple[int, int] | None = None

    def read(self, line: str):
        if m := _LOC.match(line):
            self._at = int(m[1]), int(m[2])
            self._callers[self._at] = (int(m[3]), int(m[4])) if m[3] else None

    def place(self) -> tuple[str, str]:
        at, seen = self._at, set()
        while at and at not in seen:
            seen.add(at)
            path = self._files.get(at[0], "")
            if path.startswith("csrc/") and not path.startswith("csrc/simt/"):
                break
            at = self._callers.get(at) or None
        if not at:
            return "", ""
        path = self._files.get(at[0], "")
        lines = _source_lines(path)
        return f"{path}:{at[1]}", lines[at[1] - 1].strip() if at[1] <= len(lines) else ""


def _relative(path: str) -> str:
    path = path.removeprefix("./")
    at = path.find("csrc/")
    return path[at:] if at >= 0 else path


def kernels(text: str) -> dict[str, Kernel]:
    """The kernels of a PTX file by their mangled names."""
    lines = text.split("\n")
    files = {int(m[1]): _relative(m[2]) for m in map(_FILE.match, lines) if m}
    shared, found = [], {}
    i = 0
    while i < len(lines):
        if m := _ENTRY.match(lines[i]):
            end = next(j for j in range(i, len(lines)) if lines[j].startswith("}"))
            found[m[1]] = i, lines[i : end + 1]
            i = end + 1
        elif re.match(r"\s*\.section", lines[i]):  # debug information
            i = next(j for j in range(i, len(lines)) if re.match(r"\s*}", lines[j])) + 1
        else:
            if not _FILE.match(lines[i]):
                shared.append(lines[i])
            i += 1
    return {name: _kernel(name, i + 1, shared, body, files) for name, (i, body) in found.items()}


def _kernel(name, first, shared, body, files) -> Kernel:
    places, instructions = _Places(files), []
    for number, line in enumerate(body):
        places.read(line)
        if m := _INSTRUCTION.match(line):
            guard = line[: m.start(2)].strip()
            place, source = places.place()
            instructions.append(
                Instruction(number, guard and guard + " ", m[2], m[3].strip(), place, source)
            )
    kept = ["" if _LOC.match(line) else line for line in body]
    return Kernel(name, first, shared, kept, instructions)

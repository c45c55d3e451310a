"""What a merge would do, before it is done: what goes into what, how much is read and written."""

import os
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergeme_ext.io import dtype_name, format_size
from mergeme_ext.io.operands import num_rows
from mergeme_ext.merging.engine import MergePlan
from mergeme_ext.merging.execution import Execution, PlannedTensor
from mergeme_ext.merging.registry import Scope, Visit

__all__ = ["Speeds", "TensorGroup", "groups_of", "measure", "preview"]

_PROBE_BYTES = 32 * 2**20
_PROBE_ELEMENTS = 2**20
# What Python, torch and this package take before the first tensor.
_PROCESS_BYTES = 350 * 10**6


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that differ in their layer only.

    Attributes:
        pattern: Their name, with ``*`` for numbers.
        count: How many there are.
        shape: Of each.
        nbytes: Of all together, in the result.
        parameters: By recipe key; None if they are copied.
    """

    pattern: str
    count: int
    shape: tuple[int, ...]
    nbytes: int
    parameters: Mapping[str, Any] | None


def groups_of(plan: MergePlan) -> list[TensorGroup]:
    """Return the result's tensors, grouped, in the order in which they are written."""
    kinds = plan.method.parameters
    groups: dict[tuple, TensorGroup] = {}
    for tensor in plan.tensors:
        parameters = None
        if tensor.parameters is not None:
            parameters = {kinds[name].kind.key: v for name, v in tensor.parameters.items()}
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", tensor.name)
        key = (pattern, tensor.shape, repr(parameters))
        old = groups.get(key)
        count, nbytes = (old.count, old.nbytes) if old else (0, 0)
        groups[key] = TensorGroup(
            pattern, count + 1, tensor.shape, nbytes + tensor.nbytes, parameters
        )
    return list(groups.values())


@dataclass(frozen=True)
class Speeds:
    """What a short probe measured, in bytes per second; merging counts the bytes of all inputs."""

    read: float
    merge: float
    write: float


def measure(plan: MergePlan, out: str | Path, execution: Execution) -> Speeds:
    """Return how fast this machine reads, merges and writes, after about a second of trying."""
    largest = max(plan.tensors, key=lambda t: t.nbytes)
    merged = [t for t in plan.tensors if t.parameters is not None]
    sample = max(merged, key=lambda t: t.nbytes) if merged else None
    merge = float("inf")
    if sample is not None:
        merge = _merge_speed(plan, sample) * execution.num_threads()
    return Speeds(_read_speed(largest), merge, _write_speed(Path(out)))


def _first_rows(operand, elements: int) -> torch.Tensor:
    row = max(1, torch.Size(operand.shape[1:]).numel())
    return operand.rows(0, min(num_rows(operand), max(1, elements // row)))


def _read_speed(tensor: PlannedTensor) -> float:
    begin, nbytes = time.perf_counter(), 0
    for operand in tensor.operands:
        part = _first_rows(operand, _PROBE_BYTES // operand.dtype.itemsize)
        nbytes += part.nbytes
        part.view(-1).view(torch.uint8)[::512].sum()  # touches every page
    return nbytes / max(time.perf_counter() - begin, 1e-9)


def _merge_speed(plan: MergePlan, tensor: PlannedTensor) -> float:
    base = None if tensor.base is None else _first_rows(tensor.base, _PROBE_ELEMENTS)
    models = [_first_rows(operand, _PROBE_ELEMENTS) for operand in tensor.models]
    visits = [Visit(tensor.tensor_name, base, models)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for _ in range(2):  # the first one reads the data
            begin = time.perf_counter()
            survey = None
            if plan.method.survey is not None:
                survey = plan.method.survey(lambda: iter(visits), tensor.parameters)
            combine = plan.method.prepare(
                base,
                models,
                tensor.parameters,
                tensor_name=tensor.tensor_name,
                survey=survey,
            )
            combine(None if base is None else base.reshape(-1), [m.reshape(-1) for m in models], 0)
            seconds = time.perf_counter() - begin
    finally:
        torch.set_num_threads(threads)
    every = models if base is None else [base, *models]
    return sum(t.nbytes for t in every) / max(seconds, 1e-9)


def _write_speed(out: Path) -> float:
    folder = out.absolute().parent
    while not folder.is_dir():
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder) as file:
        data = os.urandom(2**20) * (_PROBE_BYTES // 2**20)
        begin = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return _PROBE_BYTES / max(time.perf_counter() - begin, 1e-9)


def preview(plan: MergePlan, execution: Execution, speeds: Speeds) -> str:
    """Return, for people, what ``plan`` would do and how long it would take."""
    files = sum(t.nbytes for t in plan.tensors)
    lines = [
        f"{plan.method.name} ({plan.method.paper}): {len(plan.tensors)} tensors, "
        f"{format_size(files)}, {_dtypes(plan)}"
    ]
    for ref, source in plan.sources.items():
        role = "base " if ref == plan.spec.base else "model"
        dropped = len(plan.dropped.get(ref, {}))
        left = f", {dropped} of them left out" if dropped else ""
        lines.append(f"  {role} {plan.labels[ref]}: {len(source)} tensors{left}")
    lines.append("")
    lines += _table(plan)
    lines.append("")
    passes = 1 if plan.method.scope is Scope.ELEMENT else 2
    again = "" if passes == 1 else ", looked at once before it is merged"
    lines.append(f"reads {format_size(plan.read_bytes)}{again}; writes {format_size(files)}")
    lines.append(
        f"memory: at most {format_size(execution.max_memory)} for tensors, about "
        f"{format_size(_PROCESS_BYTES)} for the program; mapped files come on top, but the system "
        "takes them back when it needs to"
    )
    seconds = (
        max(passes * plan.read_bytes / speeds.read, plan.operand_bytes / speeds.merge)
        + files / speeds.write
    )
    threads = execution.num_threads()
    lines.append(
        f"about {_duration(seconds)} (a short probe: reads {_rate(speeds.read)}, merges "
        f"{_rate(speeds.merge)} on {threads} thread{'s' * (threads > 1)}, writes "
        f"{_rate(speeds.write)})"
    )
    lines += [f"note: {note}" for note in plan.layout.notes]
    if plan.vocabulary is not None:
        lines += [f"note: {note}" for note in plan.vocabulary.notes]
    return "\n".join(lines)


def _dtypes(plan: MergePlan) -> str:
    return ", ".join(dict.fromkeys(dtype_name(t.dtype) for t in plan.tensors))


def _table(plan: MergePlan) -> list[str]:
    groups = groups_of(plan)
    common = _common(groups)
    rows = [("tensors", "count", "shape", "size", "parameters")]
    for group in groups:
        if group.parameters is None:
            told = "copied"
        else:
            told = "; ".join(
                f"{key} {_value(value)}"
                for key, value in group.parameters.items()
                if key not in common
            )
        shape = "x".join(map(str, group.shape)) or "scalar"
        rows.append((group.pattern, str(group.count), shape, format_size(group.nbytes), told))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"  {r[0].ljust(widths[0])}  {r[1].rjust(widths[1])}  {r[2].rjust(widths[2])}  "
        f"{r[3].rjust(widths[3])}  {r[4]}".rstrip()
        for r in rows
    ]
    if common:
        shared = "; ".join(f"{key} {_value(value)}" for key, value in common.items())
        lines.append(f"  all: {shared}")
    return lines


def _common(groups: list[TensorGroup]) -> dict[str, Any]:
    """Return the parameters that are the same for all tensors that are merged."""
    merged = [g.parameters for g in groups if g.parameters is not None]
    if not merged:
        return {}
    return {
        key: value
        for key, value in merged[0].items()
        if all(repr(other.get(key)) == repr(value) for other in merged)
    }


def _value(value: Any) -> str:
    if isinstance(value, list):
        values = [_value(v) for v in value]
        return values[0] if len(set(values)) == 1 else ", ".join(values)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rate(speed: float) -> str:
    return "at once" if speed == float("inf") else f"{format_size(int(speed))}/s"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 0.1):.2g} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"

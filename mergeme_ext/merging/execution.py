"""Carries out a merge plan: lays tensors out, merges them chunk by chunk, writes each chunk.

Every thread reads, merges and writes its own chunks, so that one's reading and writing overlaps
another's arithmetic. What is held at a time is bounded, whatever the size of a tensor.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mergeme_ext.io import CheckpointError, CheckpointSink, dtype_name, format_size
from mergeme_ext.io.operands import Converted, Operand
from mergeme_ext.io.scratch import lay_out
from mergeme_ext.merging.devices import Device, open_device
from mergeme_ext.merging.ranks import Alone, Ranks
from mergeme_ext.merging.registry import MergeMethod, Visit
from mergeme_ext.merging.workers import run_jobs
from mergeme_ext.ops import first_nonfinite

__all__ = [
    "Execution",
    "PlannedTensor",
    "Progress",
    "ProgressFactory",
    "merge_all",
    "of_one_dtype",
    "progress_bar",
]

# Long enough that calls cost nothing, short enough that a chunk of every model fits in the cache.
CHUNK_ELEMENTS = 2**20
# What can be merged, and can hold what is no number.
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LEAST_MEMORY = 64 * 10**6
# Bytes a chunk's element takes at most, per tensor: as it is, widened, and a temporary.
_BYTES_PER_ELEMENT = 24


class Progress(Protocol):
    """What shows progress: tqdm's bars do."""

    def update(self, n: int) -> Any:
        """Take note of ``n`` more bytes written."""

    def close(self) -> Any:
        """End the display."""


# Called with the number of bytes to come.
ProgressFactory = Callable[[int], Progress]


class _NoProgress:
    def update(self, n: int) -> None:
        pass

    def close(self) -> None:
        pass


@contextlib.contextmanager
def progress_bar(progress: ProgressFactory | None, total_bytes: int) -> Iterator[Progress]:
    """Give a display of ``total_bytes`` to come, closed at the end; a silent one for None."""
    bar = _NoProgress() if progress is None else progress(total_bytes)
    try:
        yield bar
    finally:
        bar.close()


@dataclass(frozen=True)
class Execution:
    """How a merge is carried out. None of it changes a bit of the result.

    Attributes:
        threads: Threads that merge; None for as many as torch uses.
        max_memory: Bytes of memory that tensors may take at a time; mapped files, which the system
            can drop at any moment, do not count.
        chunk_elements: Elements merged at a time; None for what suits the cache and the memory.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        allow_nonfinite: Merge NaN and infinities as if they were numbers.

    Raises:
        ValueError: A number is too small.
    """

    threads: int | None = None
    max_memory: int = 2**30
    chunk_elements: int | None = None
    device: str = "cpu"
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        for name in ("threads", "chunk_elements"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"expected {name} of at least 1, got {value}")
        if self.max_memory < _LEAST_MEMORY:
            raise ValueError(
                f"expected max_memory of at least {format_size(_LEAST_MEMORY)}, "
                f"got {format_size(self.max_memory)}"
            )

    def num_threads(self) -> int:
        """Return how many threads merge."""
        return self.threads or torch.get_num_threads()

    def chunk_of(self, num_tensors: int) -> int:
        """Return the elements to merge at a time, of ``num_tensors`` inputs."""
        if self.chunk_elements is not None:
            return self.chunk_elements
        share = self.max_memory // 2 // self.num_threads()
        return max(4096, min(CHUNK_ELEMENTS, share // (_BYTES_PER_ELEMENT * (num_tensors + 1))))

    def layout_bytes(self, num_tensors: int) -> int:
        """Return the bytes up to which one of ``num_tensors`` computed inputs is held in memory."""
        return self.max_memory // 4 // self.num_threads() // num_tensors


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the result, and what it is made of.

    Attributes:
        name: In the result.
        tensor_name: Keys the random masks: its name in the base, or in the first model.
        dtype: In the result.
        shape: Likewise.
        base: The base's tensor; None if there is none or the method looks at none.
        models: The models' tensors.
        labels: What to call ``base`` and ``models`` in messages, in this order.
        parameters: Bound to exactly these models; None if the tensor is copied from ``models[0]``
            (rounded to ``dtype``).
        statistics: The models' statistics, if the method takes some.
    """

    name: str
    tensor_name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    base: Operand | None
    models: Sequence[Operand]
    labels: Sequence[str]
    parameters: dict[str, Any] | None
    statistics: Sequence[Operand | None] | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Bytes in the result."""
        return self.numel * self.dtype.itemsize

    @property
    def operands(self) -> list[Operand]:
        """The base, if there is one, then the models."""
        return [*self.models] if self.base is None else [self.base, *self.models]


def of_one_dtype(operands: Sequence[Operand], least: torch.dtype | None = None) -> list[Operand]:
    """Return ``operands`` in the smallest dtype that holds them all, and ``least`` too."""
    common = least or operands[0].dtype
    for operand in operands:
        common = torch.promote_types(common, operand.dtype)
    return [o if o.dtype == common else Converted(o, common) for o in operands]


def merge_all(
    method: MergeMethod,
    tensors: Sequence[PlannedTensor],
    sink: CheckpointSink,
    execution: Execution,
    *,
    ranks: Alone | Ranks,
    bar: Progress,
) -> None:
    """Write ``tensors`` into ``sink``, apart from what is there already.

    Raises:
        CheckpointError: An input or a result is not finite.
    """
    if execution.num_threads() * _BYTES_PER_ELEMENT * 4096 > execution.max_memory:
        raise ValueError(
            f"{execution.num_threads()} threads do not fit into "
            f"{format_size(execution.max_memory)}; use fewer threads or more memory"
        )
    merge = _Merge(method, sink, execution, open_device(execution.device), bar)
    if method.survey is not None:
        merge.survey = ranks.share("survey", lambda: merge.make_survey(tensors))
    bar.update(sink.done_bytes)
    run_jobs(
        merge.jobs(tensors, ranks),
        threads=execution.num_threads(),
        memory=execution.max_memory // 2,
    )


class _Merge:
    """What all jobs of a merge share."""

    def __init__(
        self,
        method: MergeMethod,
        sink: CheckpointSink,
        execution: Execution,
        device: Device,
        bar: Progress,
    ):
        self.method, self.sink, self.execution = method, sink, execution
        self.device, self.survey = device, None
        self._bar, self._lock = bar, threading.Lock()

    def jobs(self, tensors: Sequence[PlannedTensor], ranks: Alone | Ranks) -> Iterator["_Job"]:
        ahead = None
        for number in ranks.draw(len(tensors)):
            job = _Job(self, tensors[number])
            if not self.sink.gaps(job.tensor.name):
                continue
            for operand in job.tensor.operands:
                operand.prefetch()
            if ahead is not None:  # one job behind: its data are on their way
                yield ahead
            ahead = job
        if ahead is not None:
            yield ahead

    def wrote(self, nbytes: int) -> None:
        with self._lock:
            self._bar.update(nbytes)

    def lay_out(self, tensor: PlannedTensor) -> tuple[Tensor | None, list[Tensor]]:
        """Return the whole of a tensor's base, if it has one, and of its models."""
        limit = self.execution.layout_bytes(len(tensor.operands))
        whole = [
            lay_out(operand, folder=self.sink.folder, in_memory=limit)
            for operand in tensor.operands
        ]
        return (None, whole) if tensor.base is None else (whole[0], whole[1:])

    def check(
        self, tensor: PlannedTensor, base: Tensor | None, models: Sequence[Tensor], offset: int
    ) -> None:
        """Refuse inputs that are not finite, unless that is allowed."""
        if self.execution.allow_nonfinite:
            return
        every = models if base is None else [base, *models]
        for label, values in zip(tensor.labels, every, strict=True):
            check_finite(values.reshape(-1), offset, tensor, label)

    def make_survey(self, tensors: Sequence[PlannedTensor]) -> dict[str, Any]:
        """Let the method look at the whole model, or return what it saw before an interruption."""
        key = "the whole model"
        if key not in self.sink.notes:
            merged = [t for t in tensors if t.parameters is not None]
            parameters = merged[0].parameters if merged else {}
            rounds = itertools.count()
            seen = self.method.survey(
                lambda: self._visits(merged, check=next(rounds) == 0), parameters
            )
            self.sink.note(key, seen)
        return self.sink.notes[key]

    def _visits(self, tensors: Sequence[PlannedTensor], *, check: bool) -> Iterator[Visit]:
        for tensor in tensors:
            base, models = self.lay_out(tensor)
            if check:
                self.check(tensor, base, models, 0)
            yield Visit(tensor.tensor_name, base, models, self.statistics_of(tensor))
            for operand in tensor.operands:
                operand.release()

    def statistics_of(self, tensor: PlannedTensor) -> list[Tensor | None] | None:
        if tensor.statistics is None:
            return None
        limit = self.execution.layout_bytes(len(tensor.statistics))
        return [
            None if s is None else lay_out(s, folder=self.sink.folder, in_memory=limit)
            for s in tensor.statistics
        ]


class _Job:
    """One tensor."""

    def __init__(self, merge: _Merge, tensor: PlannedTensor):
        self._merge, self.tensor = merge, tensor
        self.numel = tensor.numel
        limit = merge.execution.layout_bytes(len(tensor.operands))
        sizes = [o.dtype.itemsize * tensor.numel for o in tensor.operands if o.stored() is None]
        self.memory = sum(size for size in sizes if size <= limit)
        self._combine, self._device = None, merge.device
        self._base: Tensor | None = None
        self._models: list[Tensor] = []

    def start(self) -> list[Callable[[], None]]:
        tensor, merge = self.tensor, self._merge
        self._base, self._models = merge.lay_out(tensor)
        step = merge.execution.chunk_of(len(tensor.operands))
        if tensor.parameters is None:
            return [partial(self._copy, *chunk) for chunk in self._chunks(step)]
        if merge.method.whole_rows:
            row = max(1, tensor.shape[-1] if tensor.shape else 1)
            step = max(1, step // row) * row
        self._prepare()
        return [partial(self._merge_chunk, *chunk) for chunk in self._chunks(step)]

    def _chunks(self, step: int) -> Iterator[tuple[int, int]]:
        """Cut what is missing at multiples of ``step``."""
        for begin, end in self._merge.sink.gaps(self.tensor.name):
            start = begin
            while start < end:
                stop = min(end, (start // step + 1) * step)
                yield start, stop
                start = stop

    def _prepare(self) -> None:
        tensor, merge = self.tensor, self._merge
        notes: dict[str, Any] = {}
        every = self._models if self._base is None else [self._base, *self._models]
        there = merge.device.whole(every)
        if there is None:  # too large for the device
            self._device, there = open_device("cpu"), every
        base, models = (None, there) if self._base is None else (there[0], there[1:])
        try:
            self._combine = merge.method.prepare(
                base,
                models,
                tensor.parameters,
                tensor_name=tensor.tensor_name,
                survey=merge.survey,
                statistics=merge.statistics_of(tensor),
                notes=notes,
            )
        except ValueError as error:
            # NaN is a better explanation, if that is what it was.
            merge.check(tensor, self._base, self._models, 0)
            raise type(error)(f"tensor {tensor.name!r}: {error}") from error
        if notes:
            merge.sink.note(tensor.name, notes)
        self._base = None if base is None else base.reshape(-1)
        self._models = [model.reshape(-1) for model in models]

    def _copy(self, start: int, stop: int) -> None:
        tensor = self.tensor
        chunk = self._models[0].reshape(-1)[start:stop]
        check = chunk.dtype in FLOATING and not self._merge.execution.allow_nonfinite
        if check:
            check_finite(chunk, start, tensor, tensor.labels[0])
        if chunk.dtype != tensor.dtype:
            chunk = chunk.to(tensor.dtype)
            if check:
                check_finite(chunk, start, tensor, None)
        self._merge.sink.write_at(tensor.name, start, chunk)
        self._merge.wrote(chunk.nbytes)

    def _merge_chunk(self, start: int, stop: int) -> None:
        tensor, merge = self.tensor, self._merge
        base = None if self._base is None else self._base[start:stop]
        models = [model[start:stop] for model in self._models]
        merge.check(tensor, base, models, start)
        dtype = models[0].dtype
        if tensor.dtype != dtype:  # else the op rounds
            work = torch.float64 if dtype == torch.float64 else torch.float32
            base = None if base is None else base.to(work)
            models = [model.to(work) for model in models]
        merged = self._device.combine(self._combine, base, models, start).to(tensor.dtype)
        if not merge.execution.allow_nonfinite:
            check_finite(merged, start, tensor, None)
        merge.sink.write_at(tensor.name, start, merged)
        merge.wrote(merged.nbytes)

    def finish(self) -> None:
        self._combine, self._base, self._models = None, None, []
        for operand in self.tensor.operands:
            operand.release()


def check_finite(chunk: Tensor, offset: int, tensor: PlannedTensor, label: str | None) -> None:
    """Refuse a flat ``chunk`` from flat index ``offset`` of ``tensor`` that is not finite.

    Raises:
        CheckpointError: Naming where the first NaN or infinity is: in the model called ``label``,
            or in the result.
    """
    first = int(first_nonfinite(chunk))
    if first < 0:
        return
    value = chunk[first].item()
    index = [int(i) for i in np.unravel_index(offset + first, tensor.shape)]
    if label is not None:
        raise CheckpointError(
            f"{label}: tensor {tensor.name!r} holds {value} at {index}; mend the model, or let it "
            "through with allow_nonfinite"
        )
    raise CheckpointError(
        f"merged tensor {tensor.name!r} would hold {value} at {index}: too large for "
        f"{dtype_name(tensor.dtype)}; choose another out_dtype, or let it through with "
        "allow_nonfinite"
    )

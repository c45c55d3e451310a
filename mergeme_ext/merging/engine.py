"""Streams checkpoints through a merge method, tensor by tensor and chunk by chunk.

Memory is bounded by the chunk, whatever the size of the tensors: inputs are mapped files and each
merged chunk goes to its place in the output at once. No bit of the result depends on the chunk.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mergeme_ext.io import (
    CheckpointError,
    CheckpointSink,
    CheckpointSource,
    TensorInfo,
    copy_companions,
    dtype_name,
)
from mergeme_ext.io.names import EMBEDDING, HEAD
from mergeme_ext.merging import registry
from mergeme_ext.merging.card import CONFIG_NAME, model_card, recipe_text
from mergeme_ext.merging.layout import Assignment, Layout, lay_out
from mergeme_ext.merging.recipe import load_merge_spec
from mergeme_ext.merging.registry import MergeMethod
from mergeme_ext.merging.spec import MergeSpec, ModelRef

__all__ = ["CHUNK_ELEMENTS", "MergePlan", "merge", "merge_chunks", "merge_tensor", "plan_merge"]

CHUNK_ELEMENTS = 8 * 2**20
MERGEABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


_NO_PROGRESS = _NoProgress()


@contextlib.contextmanager
def progress_bar(progress: ProgressFactory | None, total_bytes: int) -> Iterator[Progress]:
    """Give a display of ``total_bytes`` to come, closed at the end; a silent one for None."""
    bar = _NO_PROGRESS if progress is None else progress(total_bytes)
    try:
        yield bar
    finally:
        bar.close()


def check_output(out: str | Path, inputs: Iterable[CheckpointSource], chunk_elements: int) -> None:
    """Refuse to write onto an input, or in chunks of nothing.

    Raises:
        ValueError: ``out`` is one of ``inputs``, or ``chunk_elements`` is below 1.
    """
    if chunk_elements < 1:
        raise ValueError(f"expected chunk_elements of at least 1, got {chunk_elements}")
    for source in inputs:
        if os.path.realpath(out) == os.path.realpath(source.path):
            raise ValueError(f"{out} is one of the inputs; choose another folder")


def merge_chunks(
    method: MergeMethod,
    tensor_name: str,
    base: Tensor | None,
    tensors: Sequence[Tensor],
    parameters: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Iterator[tuple[int, Tensor]]:
    """Yield the merged tensor in chunks: the first element's flat index, and a flat chunk.

    Args:
        method: From ``registry.get``.
        tensor_name: Keys the random masks; the base's name for the tensor.
        base: Pretrained weight; None if the method needs none.
        tensors: M weights of one shape, each in any floating dtype.
        parameters: What ``method.bind`` returned.
        dtype: Of the result.
        chunk_elements: Elements in a chunk at most. No bit depends on it.

    Arithmetic is float32, or float64 if an input is; inputs of different dtypes are widened
    first, and the result is rounded once.
    """
    every = [*tensors] if base is None else [base, *tensors]
    common = every[0].dtype
    for tensor in every:
        common = torch.promote_types(common, tensor.dtype)
    every = [t.to(common) for t in every]
    whole_base, whole = (None, every) if base is None else (every[0], every[1:])
    # If the dtypes agree the op rounds; else it works in the accumulation type and to() rounds.
    wide = torch.float64 if common == torch.float64 else torch.float32
    work = dtype if dtype == common else wide
    combine = method.prepare(whole_base, whole, parameters, tensor_name=tensor_name)
    flat_base = None if whole_base is None else whole_base.reshape(-1)
    inputs = [t.reshape(-1) for t in whole]
    step = chunk_elements
    if method.whole_rows:
        row = max(1, whole[0].shape[-1] if whole[0].dim() else 1)
        step = max(1, chunk_elements // row) * row
    for start in range(0, inputs[0].numel(), step):
        chunk = slice(start, start + step)
        base_chunk = None if flat_base is None else flat_base[chunk].to(work)
        yield start, combine(base_chunk, [t[chunk].to(work) for t in inputs], start).to(dtype)


def merge_tensor(
    sink: CheckpointSink,
    name: str,
    method: MergeMethod,
    base: Tensor | None,
    tensors: Sequence[Tensor],
    parameters: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    tensor_name: str | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
    progress: Progress = _NO_PROGRESS,
) -> None:
    """Merge one tensor into the sink's tensor ``name``; see ``merge_chunks``.

    ``tensor_name`` keys the random masks; it is ``name`` unless the tensor is called otherwise in
    the base.
    """
    chunks = merge_chunks(
        method,
        name if tensor_name is None else tensor_name,
        base,
        tensors,
        parameters,
        dtype=dtype,
        chunk_elements=chunk_elements,
    )
    for start, chunk in chunks:
        sink.write_at(name, start, chunk)
        progress.update(chunk.nbytes)


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the result, and what it is made of."""

    info: TensorInfo
    assignment: Assignment
    merged: bool  # else copied from the base, or from the first model


@dataclass(frozen=True)
class MergePlan:
    """A merge whose inputs are open, checked and known to fit; nothing is written yet.

    Attributes:
        spec: What was asked for.
        method: The method.
        sources: All models, opened.
        layout: What goes where.
        tensors: The result's tensors, in the layout's order.
    """

    spec: MergeSpec
    method: MergeMethod
    sources: Mapping[ModelRef, CheckpointSource]
    layout: Layout
    tensors: Sequence[PlannedTensor]

    @property
    def lead(self) -> CheckpointSource:
        """The base, or the first model: gives order, configuration and companion files."""
        return self.sources[self.spec.lead]

    @property
    def config(self) -> Mapping[str, Any]:
        """The result's ``config.json``; empty if the lead has none."""
        return self.layout.config

    @property
    def total_bytes(self) -> int:
        """Bytes of tensor data in the result."""
        return sum(t.info.nbytes for t in self.tensors)

    def run(
        self,
        out: str | Path,
        *,
        chunk_elements: int = CHUNK_ELEMENTS,
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
        progress: ProgressFactory | None = None,
    ) -> None:
        """Write the result; see ``merge``."""
        check_output(out, self.sources.values(), chunk_elements)
        planned = CheckpointSink(
            out,
            [t.info for t in self.tensors],
            max_shard_size=max_shard_size,
            overwrite=overwrite,
        )
        with planned as sink:
            self._write_companions(sink)
            with progress_bar(progress, self.total_bytes) as bar:
                for position, tensor in enumerate(self.tensors):
                    self._prefetch(position + 1)
                    self._write(sink, tensor, chunk_elements, bar)

    def _write_companions(self, sink: CheckpointSink) -> None:
        if self.config:
            sink.write_text("config.json", json.dumps(self.config, indent=2) + "\n")
        copy_companions(self.lead, sink)
        sink.write_text("README.md", model_card(self.spec, self.method))
        sink.write_text(CONFIG_NAME, recipe_text(self.spec))

    def _inputs(self, tensor: PlannedTensor) -> list[tuple[CheckpointSource, str]]:
        """Return where the tensors to merge are, the base's first if the method needs one."""
        base = [_inputs_of(self.spec, self.sources, tensor.assignment)[0]]
        models = _inputs_of(self.spec, self.sources, replace(tensor.assignment, base=None))
        return (base if self.method.needs_base else []) + models

    def _prefetch(self, position: int) -> None:
        if position < len(self.tensors) and self.tensors[position].merged:
            for source, name in self._inputs(self.tensors[position]):
                source.prefetch(name)

    def _write(
        self, sink: CheckpointSink, tensor: PlannedTensor, chunk: int, bar: Progress
    ) -> None:
        name = tensor.info.name
        if not tensor.merged:
            source, stored = _inputs_of(self.spec, self.sources, tensor.assignment)[0]
            sink.write(name, source.tensor(stored))
            bar.update(tensor.info.nbytes)
            return
        inputs = self._inputs(tensor)
        views = [source.tensor(stored) for source, stored in inputs]
        base = views.pop(0) if self.method.needs_base else None
        merge_tensor(
            sink,
            name,
            self.method,
            base,
            views,
            tensor.assignment.parameters,
            dtype=tensor.info.dtype,
            chunk_elements=chunk,
            progress=bar,
        )
        for source, stored in inputs:
            source.release(stored)


def merge(
    recipe: str | Path | MergeSpec,
    out: str | Path,
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: ProgressFactory | None = None,
) -> MergePlan:
    """Merge checkpoints as ``recipe`` says and write the result to the folder ``out``.

    Everything is checked before anything is written; ``out`` appears only when complete.

    Args:
        recipe: A YAML file's path, or a ``MergeSpec``.
        out: Target folder.
        chunk_elements: Elements merged at a time; bounds the memory, changes no bit.
        max_shard_size: Bytes of data in one file, as a number or as ``5GB``.
        overwrite: Replace an existing checkpoint folder.
        progress: Called with the number of bytes to come; returns an object with ``update(n)``
            and ``close()``, such as a tqdm bar.

    Returns:
        The plan that was carried out.

    Raises:
        RecipeError: The recipe asks for something unknown, misplaced or out of range.
        CheckpointError: A checkpoint is damaged or does not fit the others.
        TypeError: A ``MergeSpec`` names an unknown parameter, or lacks one.
        ValueError: A parameter of it is out of range, or the target is one of the inputs.
        OSError: The target exists, or the disk has no room.
    """
    spec = recipe if isinstance(recipe, MergeSpec) else load_merge_spec(recipe)
    plan = plan_merge(spec)
    plan.run(
        out,
        chunk_elements=chunk_elements,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        progress=progress,
    )
    return plan


def plan_merge(spec: MergeSpec) -> MergePlan:
    """Open and check everything that ``spec`` names, and return what will be written.

    Raises:
        CheckpointError, TypeError, ValueError: As for ``merge``.
    """
    _refuse_what_is_not_done(spec)
    method = registry.get(spec.method)
    sources = {model: CheckpointSource(model.path) for model in spec.references}
    for source in sources.values():
        _check_readable(source)
    layout = lay_out(spec, sources)
    for model, names in layout.leftovers.items():
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise CheckpointError(
            f"{sources[spec.lead].path} has no tensor {names[0]!r}{more}, which "
            f"{sources[model].path} has"
        )
    one = torch.zeros(1)  # a dry run finds what only all parameters together can show
    for parameters, count in {
        id(a.parameters): (a.parameters, len(a.models)) for a in layout.assignments
    }.values():
        method.prepare(one, [one] * count, parameters)
    tensors = [
        _plan_tensor(assignment, spec.result_dtype, _inputs_of(spec, sources, assignment))
        for assignment in layout.assignments
    ]
    return MergePlan(spec, method, sources, layout, tensors)


def _refuse_what_is_not_done(spec: MergeSpec) -> None:
    wanted = {
        "tokenizer": spec.tokenizer is not None,
        "chat_template": spec.chat_template is not None,
        "an adapter": any(model.adapter is not None for model in spec.references),
        "another document's result": bool(spec.documents),
        "statistics": any(s.statistics for piece in spec.slices for s in piece.sources),
    }
    for what, is_wanted in wanted.items():
        if is_wanted:
            raise ValueError(f"{spec.method}: {what} is not supported yet")


def _inputs_of(
    spec: MergeSpec, sources: Mapping[ModelRef, CheckpointSource], assignment: Assignment
) -> list[tuple[CheckpointSource, str]]:
    """Return where the tensors of an assignment are, the base's first if it has one."""
    models = [
        (sources[model], name)
        for model, name in zip(assignment.models, assignment.names, strict=True)
    ]
    if assignment.base is None:
        return models
    return [(sources[spec.base], assignment.base), *models]


def _plan_tensor(
    assignment: Assignment,
    dtype: torch.dtype | None,
    inputs: Sequence[tuple[CheckpointSource, str]],
) -> PlannedTensor:
    name = assignment.name
    (lead, lead_name), *others = inputs
    stored = lead.info(lead_name)
    merged = stored.dtype in MERGEABLE
    for source, other in others:
        _check_same_shape(name, lead, stored, source, source.info(other))
        if not merged and not torch.equal(lead.tensor(lead_name), source.tensor(other)):
            raise CheckpointError(
                f"tensor {name!r} ({dtype_name(stored.dtype)}, so it cannot be merged) differs "
                f"between {lead.path} and {source.path}"
            )
    info = replace(stored, name=name, dtype=(dtype or stored.dtype) if merged else stored.dtype)
    return PlannedTensor(info, assignment, merged)


def _check_readable(source: CheckpointSource) -> None:
    """Refuse quantised weights: a merge would ignore their scales, which are separate tensors."""
    quantised = [n for n in source.names if source.info(n).dtype.itemsize == 1]
    quantised = [n for n in quantised if source.info(n).dtype.is_floating_point]
    if quantised or "quantization_config" in source.config:
        what = f"tensor {quantised[0]!r}" if quantised else "its config.json says so"
        raise CheckpointError(
            f"{source.path} is quantised ({what}); save it in bfloat16 or float32 first"
        )


def _check_same_shape(
    name: str,
    lead: CheckpointSource,
    expected: TensorInfo,
    source: CheckpointSource,
    found: TensorInfo,
) -> None:
    if expected.shape != found.shape:
        hint = ""
        if name in (EMBEDDING, HEAD) and expected.shape[1:] == found.shape[1:]:
            hint = "; models with different vocabularies cannot be merged yet"
        raise CheckpointError(
            f"tensor {name!r} is {list(expected.shape)} in {lead.path} but {list(found.shape)} "
            f"in {source.path}{hint}"
        )
    if expected.dtype != found.dtype and not {expected.dtype, found.dtype} <= set(MERGEABLE):
        raise CheckpointError(
            f"tensor {name!r} is {dtype_name(expected.dtype)} in {lead.path} but "
            f"{dtype_name(found.dtype)} in {source.path}"
        )

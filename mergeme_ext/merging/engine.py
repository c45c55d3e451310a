"""Streams checkpoints through a merge method, tensor by tensor and chunk by chunk.

Memory is bounded by the chunk, whatever the size of the tensors: inputs are mapped files and each
merged chunk goes to its place in the output at once. No bit of the result depends on the chunk.
"""

import contextlib
import json
import os
import re
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
    with_dtype,
)
from mergeme_ext.io.names import EMBEDDING, HEAD
from mergeme_ext.merging import registry
from mergeme_ext.merging.card import CONFIG_NAME, model_card, recipe_text
from mergeme_ext.merging.registry import MergeMethod
from mergeme_ext.merging.spec import MergeSpec, load_merge_spec

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
    """One tensor of the result, and what it is called in the base and in each model."""

    info: TensorInfo
    base_name: str | None
    model_names: tuple[str, ...]
    merged: bool  # else copied from the lead


@dataclass(frozen=True)
class MergePlan:
    """A merge whose inputs are open, checked and known to fit; nothing is written yet.

    Attributes:
        spec: What was asked for.
        method: The method.
        parameters: Its parameters, bound to the models.
        lead: The base, or the first model: gives order, configuration and companion files.
        base: The base, if there is one.
        models: The models to merge.
        tensors: The result's tensors, in the order in which the lead has them on disk.
        config: The result's ``config.json``; empty if the lead has none.
    """

    spec: MergeSpec
    method: MergeMethod
    parameters: Mapping[str, Any]
    lead: CheckpointSource
    base: CheckpointSource | None
    models: Sequence[CheckpointSource]
    tensors: Sequence[PlannedTensor]
    config: Mapping[str, Any]

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
        check_output(out, (self.lead, *self.models), chunk_elements)
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

    def _sources(self, tensor: PlannedTensor) -> Iterator[tuple[CheckpointSource, str]]:
        if self.base is not None and self.method.needs_base:
            yield self.base, tensor.base_name
        yield from zip(self.models, tensor.model_names, strict=True)

    def _prefetch(self, position: int) -> None:
        if position < len(self.tensors) and self.tensors[position].merged:
            for source, name in self._sources(self.tensors[position]):
                source.prefetch(name)

    def _write(
        self, sink: CheckpointSink, tensor: PlannedTensor, chunk: int, bar: Progress
    ) -> None:
        name = tensor.info.name
        if not tensor.merged:
            sink.write(name, self.lead.tensor(tensor.base_name or tensor.model_names[0]))
            bar.update(tensor.info.nbytes)
            return
        views = [source.tensor(stored) for source, stored in self._sources(tensor)]
        base = views.pop(0) if self.method.needs_base else None
        merge_tensor(
            sink,
            name,
            self.method,
            base,
            views,
            self.parameters,
            dtype=tensor.info.dtype,
            chunk_elements=chunk,
            progress=bar,
        )
        for source, stored in self._sources(tensor):
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
    method = registry.get(spec.method)
    if not spec.models:
        raise ValueError(f"{method.name}: expected at least one model, got none")
    if method.needs_base and spec.base is None:
        raise ValueError(f"{method.name}: expected a base, got None")
    parameters = method.bind(len(spec.models), spec.parameters)
    one = torch.zeros(1)  # a dry run finds what only all parameters together can show
    method.prepare(one, [one] * len(spec.models), parameters)
    base = None if spec.base is None else CheckpointSource(spec.base)
    models = [CheckpointSource(path) for path in spec.models]
    lead = models[0] if base is None else base
    aliases = resolve_heads([lead, *models])
    lead_names, *model_names = aliases
    for source, names in zip(models, model_names, strict=True):
        check_fits(lead, lead_names, source, names)
    tensors = [
        _plan_tensor(name, spec.dtype, base, lead, lead_names, models, model_names)
        for name in sorted_by_place(lead, lead_names)
    ]
    config = with_dtype(lead.config, spec.dtype)
    if config and HEAD in lead_names and config.get("tie_word_embeddings"):
        config["tie_word_embeddings"] = False
    return MergePlan(spec, method, parameters, lead, base, models, tensors, config)


def sorted_by_place(source: CheckpointSource, names: Mapping[str, str]) -> list[str]:
    """Return ``names``' keys in the order in which their data lie on disk."""
    place = {name: i for i, name in enumerate(source.names)}
    return sorted(names, key=lambda name: place[names[name]])


def _plan_tensor(
    name: str,
    dtype: torch.dtype | None,
    base: CheckpointSource | None,
    lead: CheckpointSource,
    lead_names: Mapping[str, str],
    models: Sequence[CheckpointSource],
    model_names: Sequence[Mapping[str, str]],
) -> PlannedTensor:
    stored = lead.info(lead_names[name])
    merged = stored.dtype in MERGEABLE
    info = replace(stored, name=name, dtype=(dtype or stored.dtype) if merged else stored.dtype)
    if not merged:
        value = lead.tensor(lead_names[name])
        for source, names in zip(models, model_names, strict=True):
            if not torch.equal(value, source.tensor(names[name])):
                raise CheckpointError(
                    f"tensor {name!r} ({dtype_name(stored.dtype)}, so it cannot be merged) differs "
                    f"between {lead.path} and {source.path}"
                )
    base_name = None if base is None else lead_names[name]
    return PlannedTensor(info, base_name, tuple(names[name] for names in model_names), merged)


def resolve_heads(sources: Sequence[CheckpointSource]) -> list[dict[str, str]]:
    """Return, for each source, the tensors it stands for: from name to the name it is stored under.

    They differ for the LM head only. If all heads are tied to the embedding, none has a head of
    its own; if one has, a tied one stands for its embedding under the head's name.

    Raises:
        CheckpointError: A head is tied by its configuration but differs from the embedding, or is
            missing without being tied.
    """
    resolved = []
    for source in sources:
        names = {name: name for name in source.names}
        tied = source.config.get("tie_word_embeddings") is True and EMBEDDING in source
        if tied and HEAD in source:
            if not torch.equal(source.tensor(HEAD), source.tensor(EMBEDDING)):
                raise CheckpointError(
                    f"{source.path}: config.json ties {HEAD} to {EMBEDDING}, but the two differ; "
                    "set tie_word_embeddings to false there if the head is meant to be its own"
                )
            del names[HEAD]
        resolved.append(names)
    if any(HEAD in names for names in resolved):
        for source, names in zip(sources, resolved, strict=True):
            if (
                HEAD not in names
                and source.config.get("tie_word_embeddings")
                and EMBEDDING in names
            ):
                names[HEAD] = EMBEDDING
    return resolved


def check_fits(
    lead: CheckpointSource,
    lead_names: Mapping[str, str],
    source: CheckpointSource,
    names: Mapping[str, str],
) -> None:
    """Check that ``source`` has the tensors of ``lead``, of the same shapes, in mergeable dtypes.

    Args:
        lead: What to compare with.
        lead_names: From tensor name to stored name, as ``resolve_heads`` returns it.
        source: The model to check.
        names: Likewise.

    Raises:
        CheckpointError: Naming the first tensor that does not fit, and both models.
    """
    _check_readable(lead)
    _check_readable(source)
    kinds = [s.config.get("model_type") for s in (lead, source)]
    if None not in kinds and kinds[0] != kinds[1]:
        raise CheckpointError(
            f"{source.path} is a {kinds[1]} model, {lead.path} a {kinds[0]} model; "
            "only models of one kind merge"
        )
    layers = [_layer_count(lead_names), _layer_count(names)]
    if layers[0] != layers[1]:
        raise CheckpointError(f"{source.path} has {layers[1]} layers, {lead.path} has {layers[0]}")
    for here, there, missing in (
        (lead, source, [n for n in lead_names if n not in names]),
        (source, lead, [n for n in names if n not in lead_names]),
    ):
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise CheckpointError(
                f"{there.path} has no tensor {missing[0]!r}{more}, which {here.path} has"
            )
    for name in lead_names:
        _check_same_shape(name, lead, lead.info(lead_names[name]), source, source.info(names[name]))


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


def _layer_count(names: Mapping[str, str]) -> int:
    numbers = [int(m[1]) for n in names if (m := re.search(r"(?:^|\.)layers\.(\d+)\.", n))]
    return max(numbers, default=-1) + 1

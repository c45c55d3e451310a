"""Opens the checkpoints to compare and finds the tensors that all of them have."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mergeme_ext.io import CheckpointError, CheckpointSource, dtype_name, portable_name
from mergeme_ext.io.names import EMBEDDING, HEAD

__all__ = ["Aligned", "align", "labels_of"]

MEASURABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Aligned:
    """Checkpoints whose tensors correspond by name.

    Attributes:
        base: The base, if there is one.
        models: The models.
        names: Tensors that all have, of one shape, in the order in which the first has them.
        left_out: Other tensors, and why each is not compared.
    """

    base: CheckpointSource | None
    models: tuple[CheckpointSource, ...]
    names: tuple[str, ...]
    left_out: dict[str, str]

    @property
    def sources(self) -> tuple[CheckpointSource, ...]:
        """The base, if there is one, then the models."""
        return self.models if self.base is None else (self.base, *self.models)


def labels_of(paths: Sequence[str | Path]) -> list[str]:
    """Return a name for each of ``paths`` that is free of local folders, and no name twice."""
    labels: list[str] = []
    for path in paths:
        name = label = portable_name(path)
        number = 2
        while label in labels:
            label, number = f"{name} ({number})", number + 1
        labels.append(label)
    return labels


def align(models: Sequence[str | Path], base: str | Path | None) -> Aligned:
    """Open ``models`` and ``base`` and match their tensors.

    Embeddings and heads may differ in their number of rows, and a head may be missing where it is
    tied to the embedding; they are then left out, and so are integer tensors.

    Raises:
        CheckpointError: A checkpoint cannot be read, is quantised, or does not fit the others.
        ValueError: There is too little to compare.
    """
    if not models:
        raise ValueError("expected at least one model, got none")
    if base is None and len(models) < 2:
        raise ValueError("expected a base, or at least two models to compare with each other")
    opened_base = None if base is None else CheckpointSource(base)
    opened = tuple(CheckpointSource(path) for path in models)
    sources = opened if opened_base is None else (opened_base, *opened)
    lead = sources[0]
    for source in sources:
        _check_plain(source)
        _check_type(lead, source)
    every = dict.fromkeys(name for source in sources for name in source.names)
    names, left_out = [], {}
    for name in every:
        reason = _why_left_out(name, sources)
        if reason is None:
            names.append(name)
        else:
            left_out[name] = reason
    if not names:
        raise CheckpointError(f"{lead.path}: has no floating tensor to compare")
    return Aligned(opened_base, opened, tuple(names), left_out)


def _check_plain(source: CheckpointSource) -> None:
    quantised = [n for n in source.names if source.info(n).dtype.itemsize == 1]
    quantised = [n for n in quantised if source.info(n).dtype.is_floating_point]
    if quantised or "quantization_config" in source.config:
        what = f"tensor {quantised[0]!r}" if quantised else "its config.json says so"
        raise CheckpointError(
            f"{source.path} is quantised ({what}); save it in bfloat16 or float32 first"
        )


def _check_type(lead: CheckpointSource, source: CheckpointSource) -> None:
    kinds = [s.config.get("model_type") for s in (lead, source)]
    if None not in kinds and kinds[0] != kinds[1]:
        raise CheckpointError(
            f"{source.path} is a {kinds[1]} model, {lead.path} a {kinds[0]} model; "
            "only models of one kind can be compared"
        )


def _why_left_out(name: str, sources: Sequence[CheckpointSource]) -> str | None:
    """Return why ``name`` is not compared, None if it is.

    Raises:
        CheckpointError: It should be, but a source lacks it or has another shape.
    """
    having = [source for source in sources if name in source]
    for source in sources:
        if name not in source:
            if name == HEAD and source.config.get("tie_word_embeddings") and EMBEDDING in source:
                return f"{portable_name(source.path)} ties it to {EMBEDDING}"
            raise CheckpointError(
                f"{source.path} has no tensor {name!r}, which {having[0].path} has"
            )
    infos = [source.info(name) for source in sources]
    unmeasurable = [info for info in infos if info.dtype not in MEASURABLE]
    if unmeasurable:
        return f"{dtype_name(unmeasurable[0].dtype)} is not the type of a weight"
    for source, info in zip(sources, infos, strict=True):
        if info.shape != infos[0].shape:
            if name in (EMBEDDING, HEAD) and info.shape[1:] == infos[0].shape[1:]:
                rows = [i.shape[0] for i in infos]
                return f"vocabularies differ: {', '.join(map(str, rows))} rows"
            raise CheckpointError(
                f"tensor {name!r} is {list(infos[0].shape)} in {sources[0].path} but "
                f"{list(info.shape)} in {source.path}"
            )
    return None

"""Opens the checkpoints that an MoE model is made of, and checks that they fit together."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergeme_ext.assembly.mixtral_config import check_agreement, dense_config
from mergeme_ext.assembly.recipe import MoESpec
from mergeme_ext.io import CheckpointError, CheckpointSource, dtype_name, names

__all__ = ["FLOATS", "Model", "open_models"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Model:
    """One input checkpoint, checked by itself."""

    source: CheckpointSource
    config: Mapping[str, Any]  # from dense_config

    @property
    def label(self) -> str:
        """What messages call it."""
        return str(self.source.path)


def open_models(spec: MoESpec) -> tuple[Model, list[Model], list[Model]]:
    """Return the base, the experts and the models to merge, all of them checked against the base.

    Raises:
        CheckpointError: One is damaged, unsuitable, or shaped unlike the base.
    """
    opened: dict[Path, Model] = {}

    def open_once(path: Path) -> Model:
        key = Path(path).resolve()
        if key not in opened:
            source = CheckpointSource(path)
            opened[key] = Model(source, dense_config(source.config, str(path)))
        return opened[key]

    base = open_once(spec.base_model)
    check_tensors(base)
    experts = [open_once(expert.source_model) for expert in spec.experts]
    for model in opened.values():
        if model is not base:
            check_against_base(base, model)
    experts += [base] * spec.base_as_expert
    return base, experts, [open_once(path) for path in spec.merged_models()]


def check_against_base(base: Model, expert: Model) -> None:
    for name in names.dense_shapes(base.config):
        if name not in expert.source:
            continue  # check_tensors, or the comparison of the configs, says more
        wanted, found = base.source.info(name).shape, expert.source.info(name).shape
        if wanted != found:
            raise CheckpointError(
                f"{expert.label}: expected {name} of shape {list(wanted)} as in {base.label}, "
                f"got {list(found)}"
            )
    for difference in check_agreement(base.config, base.label, expert.config, expert.label):
        warnings.warn(difference, stacklevel=2)
    check_tensors(expert)


def check_tensors(model: Model) -> None:
    """Raise CheckpointError unless ``model`` holds just the weights that its config asks for."""
    expected = names.dense_shapes(model.config)
    for name in model.source.names:
        if name not in expected and not is_derived(model, name):
            reason = "it has no place in a LLaMA or Mistral model"
            if name.endswith(".bias"):
                reason = "Mixtral's layers have no bias to put it in"
            raise CheckpointError(f"{model.label}: cannot use tensor {name}: {reason}")
    for name, shape in expected.items():
        if name not in model.source:
            raise CheckpointError(
                f"{model.label}: expected tensor {name} of shape {list(shape)}, which is missing"
            )
        found = model.source.info(name)
        if found.shape != shape:
            raise CheckpointError(
                f"{model.label}: expected {name} of shape {list(shape)} by its config.json, "
                f"got {list(found.shape)}"
            )
        if found.dtype not in FLOATS:
            raise CheckpointError(
                f"{model.label}: expected {name} to be {', '.join(map(dtype_name, FLOATS))}, "
                f"got {dtype_name(found.dtype)}"
            )


def is_derived(model: Model, name: str) -> bool:
    """Whether ``name`` holds nothing of its own: a rotary table, or the head of a tied model."""
    part = names.part_of(name)
    if part is not None and part.kind is names.PartKind.BUFFER:
        return True
    if name != names.HEAD or not model.config["tie_word_embeddings"]:
        return False
    if names.EMBEDDING in model.source and torch.equal(
        model.source.tensor(names.HEAD), model.source.tensor(names.EMBEDDING)
    ):
        return True
    raise CheckpointError(
        f"{model.label}: expected {names.HEAD} to equal {names.EMBEDDING}, as "
        "tie_word_embeddings is true, got another tensor"
    )

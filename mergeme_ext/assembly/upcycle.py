"""Puts LLaMA- or Mistral-shaped experts into a Mixtral checkpoint, one tensor at a time."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergeme_ext.assembly.card import model_card, recipe_text
from mergeme_ext.assembly.inputs import Model, open_models
from mergeme_ext.assembly.mixtral_config import mixtral_config
from mergeme_ext.assembly.recipe import MoESpec, load_moe_spec, merge_method
from mergeme_ext.assembly.router_init import (
    Prompts,
    condition,
    mean_inputs,
    random_rows,
    rows_from_means,
)
from mergeme_ext.io import CheckpointSink, TensorInfo, copy_companions, dtype_name, names
from mergeme_ext.io.operands import Stored
from mergeme_ext.merging.card import CONFIG_NAME
from mergeme_ext.merging.engine import (
    check_output,
    write_checkpoint,
)
from mergeme_ext.merging.execution import (
    Execution,
    PlannedTensor,
    ProgressFactory,
    of_one_dtype,
)
from mergeme_ext.merging.registry import MergeMethod

__all__ = ["MoEPlan", "build_moe", "plan_moe"]

FFN_ROLES = ("gate", "up", "down")
CONDITION_LIMIT = 5.0  # above it prompts are so alike that routing is close to arbitrary


@dataclass(frozen=True)
class MoETensor:
    """One tensor of the result and what it is made of.

    Attributes:
        info: Name, dtype and shape.
        origin: Name in the inputs; empty for a router.
        expert: Whose tensor is copied; None for a router and for what is merged.
        layer: The router's layer.
    """

    info: TensorInfo
    origin: str = ""
    expert: int | None = None
    layer: int | None = None


@dataclass(frozen=True)
class MoEPlan:
    """A model whose inputs are open, checked and known to fit; nothing is written yet.

    Attributes:
        spec: What was asked for.
        base: The base.
        experts: Where each expert's MLPs come from.
        merged: The models that the rest is merged from.
        method: How it is merged.
        parameters: The method's parameters, bound to ``merged``.
        tensors: The result's tensors, in the order in which they are written.
    """

    spec: MoESpec
    base: Model
    experts: Sequence[Model]
    merged: Sequence[Model]
    method: MergeMethod
    parameters: Mapping[str, Any]
    tensors: Sequence[MoETensor]

    @property
    def total_bytes(self) -> int:
        """Bytes of tensor data in the result."""
        return sum(tensor.info.nbytes for tensor in self.tensors)

    @property
    def config(self) -> dict[str, Any]:
        """The result's ``config.json``."""
        dtype = self.spec.dtype or self.base.source.default_dtype(names.EMBEDDING)
        return mixtral_config(
            self.base.config,
            num_experts=len(self.experts),
            experts_per_token=self.spec.experts_per_token,
            dtype=dtype_name(dtype),
        )

    def run(
        self,
        out: str | Path,
        *,
        execution: Execution | None = None,
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
        progress: ProgressFactory | None = None,
    ) -> None:
        """Write the result; see ``build_moe``."""
        check_output(out, [model.source.path for model in (self.base, *self.experts)])
        rows = router_rows(self.spec, self.base, self.experts)
        write_checkpoint(
            out,
            [self._planned(tensor, rows) for tensor in self.tensors],
            self.method,
            execution or Execution(),
            finish=self._write_companions,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=progress,
        )

    def _write_companions(self, sink: CheckpointSink) -> None:
        sink.write_text("config.json", json.dumps(self.config, indent=2) + "\n")
        copy_companions(self.base.source, sink)
        recipe = recipe_text(self.spec)
        sink.write_text(CONFIG_NAME, recipe)
        sink.write_text("README.md", model_card(self.spec, recipe))

    def _planned(self, tensor: MoETensor, rows: Sequence[Tensor]) -> PlannedTensor:
        info = tensor.info
        if tensor.layer is not None:
            models, operands = [], [Stored(rows[tensor.layer])]
        elif tensor.expert is not None:
            models = [self.experts[tensor.expert]]
        else:
            models = [*([self.base] if self.method.takes_base else []), *self.merged]
        if models:
            operands = of_one_dtype([m.source.operand(tensor.origin) for m in models])
        is_merged = tensor.layer is None and tensor.expert is None
        return PlannedTensor(
            name=info.name,
            tensor_name=tensor.origin or info.name,
            dtype=info.dtype,
            shape=info.shape,
            base=operands.pop(0) if is_merged and self.method.takes_base else None,
            models=operands,
            labels=[str(m.source.path) for m in models] or ["the router rows"],
            parameters=self.parameters if is_merged else None,
        )


def build_moe(
    recipe: str | Path | MoESpec,
    out: str | Path,
    *,
    execution: Execution | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: ProgressFactory | None = None,
) -> MoEPlan:
    """Write the Mixtral checkpoint that ``recipe`` describes to the folder ``out``.

    Everything is checked before anything is written; ``out`` appears only when complete.

    Args:
        recipe: A YAML file's path, or an ``MoESpec``.
        out: Target folder.
        execution: Threads, memory, chunk; none of it changes a bit.
        max_shard_size: Bytes of data in one file, as a number or as ``5GB``.
        overwrite: Replace an existing checkpoint folder.
        progress: Called with the number of bytes to come; returns an object with ``update(n)``
            and ``close()``, such as a tqdm bar.

    Returns:
        The plan that was carried out.

    Raises:
        RecipeError: The recipe asks for something unknown, misplaced or out of range.
        CheckpointError: A checkpoint is damaged, does not fit the base, or needs what Mixtral
            does not have.
        ImportError: ``gate_mode`` is hidden and transformers is missing.
        TypeError: An ``MoESpec`` names an unknown parameter of its merge method.
        ValueError: A value is out of range, or the target is one of the inputs.
        OSError: The target exists, or the disk has no room.

    Determinism: the bytes depend on the recipe and the inputs alone, but for router rows of
    ``gate_mode`` hidden: they come from a forward pass through torch's matrix products, whose
    rounding may change with the machine and its threads.

    Source: MergeME, Zhou et al. 2025, arXiv:2502.00997, section 3.1 (``merge`` by ties or dare_*
    with density 0.8, lambda 1/n and normalize false is its setting; it leaves the router's first
    values open); Branch-Train-MiX, Sukhbaatar et al. 2024, arXiv:2403.07816 (the plain mean).
    """
    spec = recipe if isinstance(recipe, MoESpec) else load_moe_spec(recipe)
    plan = plan_moe(spec)
    plan.run(
        out,
        execution=execution,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        progress=progress,
    )
    return plan


def plan_moe(spec: MoESpec) -> MoEPlan:
    """Open and check everything that ``spec`` names, and return what will be written.

    Raises:
        CheckpointError, TypeError, ValueError: As for ``build_moe``.
    """
    base, experts, merged = open_models(spec)
    method = merge_method(spec.merge.method)
    if not merged:
        raise ValueError(f"{method.name}: expected an expert besides the base, got none")
    parameters = method.bind(len(merged), spec.merge.parameters)
    one = torch.zeros(1)  # a dry run finds what only all parameters together can show
    method.prepare(one, [one] * len(merged), parameters)
    tensors = plan_tensors(spec, base, len(experts))
    return MoEPlan(spec, base, experts, merged, method, parameters, tensors)


def plan_tensors(spec: MoESpec, base: Model, num_experts: int) -> list[MoETensor]:
    """Return the tensors of the result in the order in which they are written."""
    tensors = []
    for name, shape in names.dense_shapes(base.config).items():
        dtype = spec.dtype or base.source.default_dtype(name)
        part = names.part_of(name)
        if part.kind is not names.PartKind.FFN:
            tensors.append(MoETensor(TensorInfo(name, dtype, shape), name))
            continue
        if part.role == FFN_ROLES[0]:
            router = names.mixtral_router_name(part.layer)
            rows = TensorInfo(router, dtype, (num_experts, base.config["hidden_size"]))
            tensors.append(MoETensor(rows, layer=part.layer))
        for e in range(num_experts):
            target = names.mixtral_expert_name(part.layer, e, part.role)
            tensors.append(MoETensor(TensorInfo(target, dtype, shape), name, e))
    return tensors


def router_rows(spec: MoESpec, base: Model, experts: list[Model]) -> list[Tensor]:
    """Return the router weight of every layer, [E, H] float32 or float64."""
    layers, hidden = base.config["num_hidden_layers"], base.config["hidden_size"]
    shape = (len(experts), hidden)
    if spec.gate_mode == "zero":
        return [torch.zeros(shape)] * layers
    if spec.gate_mode == "random":
        return [
            random_rows(shape, spec.seed, names.mixtral_router_name(layer))
            for layer in range(layers)
        ]
    prompts = [Prompts(e.prompts(), e.negative_prompts) for e in spec.experts]
    if spec.base_as_expert and spec.base_prompts:
        prompts.append(Prompts(spec.base_prompts))
    options = {
        "tokenizer": base.source.path,
        "gate_input": spec.gate_input,
        "pool": spec.gate_pool,
        "max_tokens": spec.prompt_tokens,
    }
    if spec.hidden_from == "base":
        means = mean_inputs(base.source.path, prompts, **options)
    else:
        means = torch.cat(
            [
                mean_inputs(model.source.path, [own], **options)
                for model, own in zip(experts, prompts, strict=False)
            ],
            dim=1,
        )
    if means.shape[1] < len(experts):  # the base, without prompts: no expert's domain
        means = torch.cat([means, means.mean(1, keepdim=True)], dim=1)
    center = spec.gate_center and len(experts) > 1
    rows = [rows_from_means(m, center=center, scale=spec.gate_scale) for m in means]
    warn_if_alike(rows, center)
    return rows


def warn_if_alike(rows: list[Tensor], center: bool) -> None:
    conditions = [condition(r, center=center) for r in rows]
    worst = max(range(len(rows)), key=lambda layer: conditions[layer])
    if conditions[worst] > CONDITION_LIMIT:
        warnings.warn(
            f"the router rows are hard to tell apart: condition number {conditions[worst]:.3g} in "
            f"layer {worst}, above {CONDITION_LIMIT:g} in "
            f"{sum(c > CONDITION_LIMIT for c in conditions)} of {len(rows)} layers; give the "
            "experts prompts that differ more",
            stacklevel=2,
        )

"""The recipe of a Mixture-of-Experts model: its keys, their defaults and their checks."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mergeme_ext.io import dtype_name, portable_name
from mergeme_ext.merging import registry
from mergeme_ext.merging.recipe import read_dtype, read_method, read_parameters
from mergeme_ext.merging.registry import MergeMethod
from mergeme_ext.recipes import Section, load_recipe

__all__ = ["ExpertSpec", "MergeChoice", "MoESpec", "load_moe_spec"]

CHOICES = {
    "architecture": ("mixtral",),
    "gate_mode": ("hidden", "random", "zero"),
    "gate_input": ("router", "residual"),
    "gate_pool": ("mean", "last"),
    "hidden_from": ("base", "expert"),
}
_LATER = "not supported yet"
_REFUSED = {
    "shared_experts": f"shared experts are {_LATER}; Mixtral has none",
    "tokenizer_source": f"merging vocabularies is {_LATER}; the base's tokenizer is copied",
    "merge_method": "goes under merge, as method",
    "parameters": "go under merge, as parameters",
}
_REFUSED_EXPERT = {
    "noise_scale": f"noise on the experts is {_LATER}",
    "residual_scale": f"scaling the experts is {_LATER}",
}


@dataclass(frozen=True)
class ExpertSpec:
    """One expert and what it is for.

    Attributes:
        source_model: Folder of a checkpoint.
        positive_prompts: Texts that this expert should get.
        negative_prompts: Texts that it should not.
        prompts_file: More positive prompts: a .jsonl file with a "text" in each line, or any other
            text file with one prompt per line.
    """

    source_model: Path
    positive_prompts: Sequence[str] = ()
    negative_prompts: Sequence[str] = ()
    prompts_file: Path | None = None

    def prompts(self) -> list[str]:
        """Return all positive prompts, those of ``prompts_file`` last."""
        more = read_prompts(self.prompts_file) if self.prompts_file else []
        return [*self.positive_prompts, *more]


@dataclass(frozen=True)
class MergeChoice:
    """How everything but the MLPs is merged.

    Attributes:
        method: Name of a registered merge method.
        parameters: By Python name; a per-model one is one number for all or one for each merged
            model. Weights are 1 unless given.
    """

    method: str = "linear"
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MoESpec:
    """What ``build_moe`` needs to know; the attributes are the keys of the YAML file.

    Attributes:
        base_model: Folder of the checkpoint that the experts were tuned from.
        experts: In the order that they get in the result; the base may be one of them.
        architecture: "mixtral".
        base_as_expert: Add the base's MLPs as a last expert.
        base_prompts: Prompts for it; without any, its row is the mean of the others.
        experts_per_token: K in [1, number of experts].
        dtype: Of the result; None keeps that of each of the base's tensors.
        merge: For everything but the MLPs. Methods that average whole models get every expert, the
            base included if it is one; methods over task vectors get the experts but the base.
        gate_mode: First values of the router: "hidden" (from prompts), "random" or "zero".
        gate_input: For "hidden": what rows are means of. "router" is what the router will read,
            the output of each layer's post-attention norm; "residual" is what enters the layer.
        gate_pool: For "hidden": "mean" over a prompt's tokens, or its "last" token.
        gate_center: For "hidden": keep only what tells experts apart.
        gate_scale: For "hidden": length of a row; larger means sharper routing.
        hidden_from: For "hidden": run the "base" on all prompts, or each "expert" on its own.
        prompt_tokens: For "hidden": longer prompts are cut to this many tokens.
        seed: For "random".
    """

    base_model: Path
    experts: Sequence[ExpertSpec]
    architecture: str = "mixtral"
    base_as_expert: bool = False
    base_prompts: Sequence[str] = ()
    experts_per_token: int = 2
    dtype: torch.dtype | None = None
    merge: MergeChoice = field(default_factory=MergeChoice)
    gate_mode: str = "hidden"
    gate_input: str = "router"
    gate_pool: str = "mean"
    gate_center: bool = True
    gate_scale: float = 4.0
    hidden_from: str = "base"
    prompt_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for key, allowed in CHOICES.items():
            if getattr(self, key) not in allowed:
                raise ValueError(
                    f"expected {key} to be one of {', '.join(allowed)}, got {getattr(self, key)!r}"
                )
        if problem := _too_many(self.experts_per_token, len(self.experts) + self.base_as_expert):
            raise ValueError(problem)
        for i, expert in enumerate(self.experts):
            if self.gate_mode == "hidden" and not (expert.positive_prompts or expert.prompts_file):
                raise ValueError(f"expected experts[{i}] {_NO_PROMPTS}")
        if not self.gate_scale > 0:
            raise ValueError(f"expected gate_scale to be a number above 0, got {self.gate_scale}")
        if self.prompt_tokens < 1:
            raise ValueError(f"expected prompt_tokens to be at least 1, got {self.prompt_tokens}")

    def merged_models(self) -> list[Path]:
        """Return the folders of the models that ``merge`` is given, besides the base."""
        folders = [expert.source_model for expert in self.experts]
        base = self.base_model.resolve()
        if registry.get(self.merge.method).needs_base:
            return [folder for folder in folders if folder.resolve() != base]
        return folders + [self.base_model] * self.base_as_expert

    def document(self) -> dict[str, Any]:
        """Return the recipe as plain data, with files by public name instead of by path."""
        out: dict[str, Any] = {}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if entry.name == "base_model":
                out[entry.name] = portable_name(value)
            elif entry.name == "experts":
                out[entry.name] = [_expert_document(expert) for expert in value]
            elif entry.name == "merge":
                kinds = {k: p.kind for k, p in registry.get(value.method).parameters.items()}
                parameters = {kinds[name].key: v for name, v in value.parameters.items()}
                out[entry.name] = {"method": value.method, "parameters": parameters}
            elif entry.name == "dtype":
                out |= {} if value is None else {entry.name: dtype_name(value)}
            elif entry.name != "base_prompts" or value:
                out[entry.name] = list(value) if entry.name == "base_prompts" else value
        return out


def _expert_document(expert: ExpertSpec) -> dict[str, Any]:
    out: dict[str, Any] = {"source_model": portable_name(expert.source_model)}
    for key in ("positive_prompts", "negative_prompts"):
        if getattr(expert, key):
            out[key] = list(getattr(expert, key))
    if expert.prompts_file:
        out["prompts_file"] = expert.prompts_file.name
    return out


_NO_PROMPTS = (
    "to have positive_prompts or a prompts_file, as gate_mode is hidden, got neither; "
    "or choose gate_mode random"
)


def _too_many(experts_per_token: int, num_experts: int) -> str | None:
    if 1 <= experts_per_token <= num_experts:
        return None
    return (
        f"expected experts_per_token to be in [1, {num_experts}], as there are {num_experts} "
        f"experts, got {experts_per_token}"
    )


def merge_method(name: str) -> MergeMethod:
    """Return the method, its ``weights`` one for each model unless given."""
    method = registry.get(name)
    parameters = {
        key: dataclasses.replace(p, default=1.0) if key == "weights" else p
        for key, p in method.parameters.items()
    }
    return dataclasses.replace(method, parameters=parameters)


def load_moe_spec(path: str | Path) -> MoESpec:
    """Return the model that the recipe at ``path`` describes.

    Raises:
        RecipeError: It asks for something unknown or out of range, or a file is missing.
    """
    recipe = load_recipe(path)
    recipe.allow_only([f.name for f in dataclasses.fields(MoESpec)], refused=_REFUSED)
    values: dict[str, Any] = {
        key: recipe.text(key, None, choices=choices) for key, choices in CHOICES.items()
    }
    values |= {
        "base_model": recipe.folder("base_model"),
        "experts": [_read_expert(section) for section in recipe.sections("experts")],
        "base_as_expert": recipe.boolean("base_as_expert", None),
        "base_prompts": recipe.texts("base_prompts", None),
        "experts_per_token": recipe.integer("experts_per_token", None, low=1),
        "dtype": read_dtype(recipe, "dtype"),
        "gate_center": recipe.boolean("gate_center", None),
        "gate_scale": recipe.number("gate_scale", None, low=0, open_low=True),
        "prompt_tokens": recipe.integer("prompt_tokens", None, low=1),
        "seed": recipe.integer("seed", None, low=0, high=2**64 - 1),
    }
    values = {key: value for key, value in values.items() if value is not None}
    num_experts = len(values["experts"]) + values.get("base_as_expert", False)
    if problem := _too_many(values.get("experts_per_token", 2), num_experts):
        raise recipe.error(problem, "experts_per_token")
    if values.get("gate_mode", "hidden") == "hidden":
        sections = recipe.sections("experts")
        for section, expert in zip(sections, values["experts"], strict=True):
            if not (expert.positive_prompts or expert.prompts_file):
                raise section.error(f"expected {section.where} {_NO_PROMPTS}")
    if "base_prompts" in recipe and not values.get("base_as_expert"):
        raise recipe.error(
            "base_prompts are for base_as_expert: true, which is not set", "base_prompts"
        )
    if (merge := recipe.section("merge")) is not None:
        values["merge"] = _read_merge(merge, values)
    return MoESpec(**values)


def _read_expert(section: Section) -> ExpertSpec:
    section.allow_only([f.name for f in dataclasses.fields(ExpertSpec)], refused=_REFUSED_EXPERT)
    file = section.text("prompts_file", None)
    if file is not None:
        written = Path(file).expanduser()
        places = (section.file.parent / written, written)
        file = next((place for place in places if place.is_file()), written)
        try:
            read_prompts(file)
        except ValueError as error:
            raise section.error(
                f"{section.path_of('prompts_file')}: {error}", "prompts_file"
            ) from None
    return ExpertSpec(
        section.folder("source_model"),
        section.texts("positive_prompts", ()),
        section.texts("negative_prompts", ()),
        file,
    )


def _read_merge(section: Section, values: Mapping[str, Any]) -> MergeChoice:
    section.allow_only([f.name for f in dataclasses.fields(MergeChoice)])
    method = merge_method(read_method(section, "method").name)
    partial = {k: v for k, v in values.items() if k in ("base_model", "experts", "base_as_expert")}
    models = MoESpec(
        **partial, merge=MergeChoice(method.name), gate_mode="zero", experts_per_token=1
    )
    count = len(models.merged_models())
    if count == 0:
        raise section.error(f"{method.name} needs an expert besides the base", "method")
    return MergeChoice(method.name, read_parameters(section, method, count))


def read_prompts(path: Path) -> list[str]:
    """Return the prompts in ``path``: "text" of each line of a .jsonl file, else its lines.

    Raises:
        ValueError: The file cannot be read, a line is not what it should be, or there is no text.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ValueError(f"expected a readable text file, got {path.name}: {reason}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompts.append(
            _text_of(line, f"{path.name}, line {number}") if path.suffix == ".jsonl" else line
        )
    if not prompts:
        raise ValueError(f"expected at least one prompt in {path.name}, got none")
    return prompts


def _text_of(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str) or not text:
        raise ValueError(f'expected an object with a "text" in {where}, got {line[:60]!r}')
    return text

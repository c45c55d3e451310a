"""What a merge is asked to do, read from a recipe or built in Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import mergeme_ext.merging.methods  # noqa: F401  (registers them)
from mergeme_ext.io import dtype_name, portable_name
from mergeme_ext.merging import registry
from mergeme_ext.merging.registry import MergeMethod
from mergeme_ext.recipes import Section, load_recipe

__all__ = [
    "DTYPES",
    "MergeSpec",
    "load_merge_spec",
    "read_dtype",
    "read_method",
    "read_parameters",
]

DTYPES = {dtype_name(d): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
_LATER = "not supported yet"
_REFUSED = {
    "slices": f"layer ranges are {_LATER}; list whole models under models",
    "modules": f"modules are {_LATER}; list whole models under models",
    "tokenizer": f"merging vocabularies is {_LATER}; the base's tokenizer is copied",
    "tokenizer_source": f"merging vocabularies is {_LATER}; the base's tokenizer is copied",
    "chat_template": f"setting it is {_LATER}; the base's is copied",
}
# In shared recipes; here masks are never stored, so it has nothing to act on.
_WITHOUT_EFFECT = {"int8_mask"}


@dataclass(frozen=True)
class MergeSpec:
    """One merge.

    Attributes:
        method: Name of a registered method.
        models: Folders of the models to merge, the base not among them (unless the method averages
            whole models, such as ``linear``).
        base: Folder of the base; its configuration and tokenizer go into the result. Methods that
            need no base take the first model's if there is none.
        parameters: By Python name; a per-model one is one number for all models or one for each.
        dtype: Of the result's floating tensors; None keeps the base's.
    """

    method: str
    models: Sequence[Path]
    base: Path | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None

    def document(self) -> dict[str, Any]:
        """Return the recipe as plain data, with models by public name instead of by path."""
        method = registry.get(self.method)
        models: list[dict[str, Any]] = [{"model": portable_name(path)} for path in self.models]
        shared = {}
        for name, value in self.parameters.items():
            kind = method.parameters[name].kind
            if kind.per_model and isinstance(value, Sequence) and not isinstance(value, str):
                for model, one in zip(models, value, strict=True):
                    model.setdefault("parameters", {})[kind.key] = one
            else:
                shared[kind.key] = value
        out: dict[str, Any] = {"merge_method": self.method}
        if self.base is not None:
            out["base_model"] = portable_name(self.base)
        out["models"] = models
        if shared:
            out["parameters"] = shared
        if self.dtype is not None:
            out["dtype"] = dtype_name(self.dtype)
        return out


def load_merge_spec(path: str | Path) -> MergeSpec:
    """Return the merge that the recipe at ``path`` describes.

    Raises:
        RecipeError: It asks for something unknown or out of range, or a model's folder is missing.
    """
    recipe = load_recipe(path)
    recipe.allow_only(
        ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype"),
        refused=_REFUSED,
    )
    method = read_method(recipe, "merge_method")
    base = recipe.folder("base_model", None)
    if base is None and method.needs_base:
        raise recipe.error(f"{method.name} needs a base_model", "merge_method")
    models, sections = _read_models(recipe, method, base)
    parameters = read_parameters(recipe, method, sections)
    dtype = read_dtype(recipe, "out_dtype") or read_dtype(recipe, "dtype")
    return MergeSpec(method.name, models, base, parameters, dtype)


def read_method(section: Section, key: str) -> MergeMethod:
    """Return the method named under ``key``.

    Raises:
        RecipeError: There is no such method.
    """
    return registry.get(section.text(key, choices=registry.names()))


def read_dtype(section: Section, key: str) -> torch.dtype | None:
    """Return the dtype named under ``key``; None if there is no such key."""
    name = section.text(key, None, choices=list(DTYPES))
    return None if name is None else DTYPES[name]


def _read_models(
    recipe: Section, method: MergeMethod, base: Path | None
) -> tuple[list[Path], list[Section | None]]:
    """Return the models' folders and parameters; a base listed among them is left out."""
    models: list[Path] = []
    sections: list[Section | None] = []
    seen: dict[Path, str] = {}
    for entry in recipe.sections("models"):
        entry.allow_only(("model", "parameters"))
        model, parameters = entry.folder("model"), entry.section("parameters")
        real = model.resolve()
        if real in seen:
            raise entry.error(f"{entry.path_of('model')} is {seen[real]} again", "model")
        seen[real] = entry.path_of("model")
        if method.needs_base and real == base.resolve():
            if parameters is not None and parameters.keys:
                raise parameters.error(
                    f"{parameters.where}: the base takes no parameters: its task vector is zero"
                )
            continue
        models.append(model)
        sections.append(parameters)
    if not models:
        raise recipe.error(f"{method.name} needs a model besides the base", "models")
    return models, sections


def read_parameters(
    recipe: Section, method: MergeMethod, models: Sequence[Section | None], key: str = "parameters"
) -> dict[str, Any]:
    """Return a method's parameters by Python name, from ``recipe`` and from each model's section.

    Args:
        recipe: Section whose ``key`` holds parameters for all models.
        method: Whose parameters they are.
        models: Each model's own parameters, which come first for that model; None for none.
        key: Name of the mapping in ``recipe``.

    Raises:
        RecipeError: A parameter is unknown, misplaced, missing or out of range.
    """
    shared = recipe.section(key)
    for section in (shared, *models):
        if section is not None:
            _check_keys(section, method, per_model=section is not shared)
    out: dict[str, Any] = {}
    for name, parameter in method.parameters.items():
        common = _read_value(shared, parameter, len(models))
        if not parameter.kind.per_model:
            values = [common]
        else:
            own = [_read_value(section, parameter, len(models)) for section in models]
            values = [common if value is None else value for value in own]
        if all(value is None for value in values) and not parameter.required:
            continue
        if None in values and parameter.required:
            place = models[values.index(None)] or shared or recipe
            raise place.error(f"{method.name} needs parameter {parameter.kind.key!r} of each model")
        values = [parameter.default if value is None else value for value in values]
        out[name] = values if parameter.kind.per_model else common
    return out


def _check_keys(section: Section, method: MergeMethod, *, per_model: bool) -> None:
    kinds = [p.kind for p in method.parameters.values()]
    known = [k.key for k in kinds if k.per_model or not per_model]
    refused = {
        k.key: "is one for the whole merge; it goes into the recipe's own parameters"
        for k in kinds
        if k.key not in known
    }
    section.allow_only(known, tolerated=() if per_model else _WITHOUT_EFFECT, refused=refused)


def _read_value(section: Section | None, parameter: registry.Parameter, num_models: int) -> Any:
    """Return a parameter as written, once it has passed its check; None if it is not there."""
    word = parameter.kind.key
    if section is None or word not in section:
        return None
    value = section.value(word)
    if isinstance(value, list | dict):
        raise section.error(
            f"{section.path_of(word)}: lists (gradients over layers) and filters are {_LATER}; "
            "give one value",
            word,
        )
    try:
        checked = parameter.kind.check(value, num_models)
    except ValueError as error:
        raise section.expect(word, str(error), value) from None
    return value if value == "1/n" else checked

"""Reads merges from recipes: the keys of mergekit's YAML, and what each may hold."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mergeme_ext.io.names import MODULES
from mergeme_ext.merging import registry
from mergeme_ext.merging.references import ModelReader
from mergeme_ext.merging.registry import MergeMethod
from mergeme_ext.merging.settings import Setting, SettingError
from mergeme_ext.merging.spec import (
    DTYPES,
    MergeSpec,
    ModelRef,
    Module,
    Settings,
    Slice,
    Source,
    TokenizerSpec,
)
from mergeme_ext.merging.tokens import read_tokenizer
from mergeme_ext.recipes import RecipeError, Section, load_recipes, nearest

__all__ = [
    "CHAT_TEMPLATES",
    "load_merge_spec",
    "load_merge_specs",
    "read_dtype",
    "read_method",
    "read_parameters",
]

# What chat_template may name; anything else must be a template.
CHAT_TEMPLATES = ("alpaca", "auto", "chatml", "exaone", "llama3", "mistral")
_CONTENTS = ("models", "slices", "modules")
_KEYS = (
    "merge_method",
    "base_model",
    *_CONTENTS,
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer",
    "tokenizer_source",
    "chat_template",
    "name",
)
# In shared recipes; here masks are never stored, so it has nothing to act on.
_WITHOUT_EFFECT = {"int8_mask"}
DEFAULT_MODULE = "default"


def load_merge_spec(path: str | Path) -> MergeSpec:
    """Return the merge that the recipe at ``path`` describes; it must be one.

    Raises:
        RecipeError: It asks for something unknown or out of range, or a model's folder is missing.
    """
    first, *more = load_merge_specs(path)
    if more:
        raise RecipeError(f"{path}: expected one merge, got {len(more) + 1} documents")
    return first


def load_merge_specs(path: str | Path) -> list[MergeSpec]:
    """Return the merges of all documents of the recipe at ``path``.

    They come in an order in which each stands after those whose results it reads; the last is the
    recipe's result. Models may be other documents' names.

    Raises:
        RecipeError: As for ``load_merge_spec``; or documents need each other in a circle, or it
            isn't clear which is the result.
    """
    sections = load_recipes(path)
    names = _document_names(sections)
    specs = [_Reader(section, set(names)).read() for section in sections]
    order = _dependency_order(sections, names, specs)
    return [specs[i] for i in order]


def _document_names(sections: Sequence[Section]) -> dict[str, int]:
    names: dict[str, int] = {}
    nameless = [i for i, section in enumerate(sections) if "name" not in section]
    if len(nameless) > 1:
        raise sections[nameless[1]].error(
            "key 'name' is missing: of several documents one may lack it, the result"
        )
    for i, section in enumerate(sections):
        if (name := section.text("name", None)) is None:
            continue
        if name in names:
            raise section.error(f"name {name!r} is another document's too", "name")
        names[name] = i
    return names


def _dependency_order(
    sections: Sequence[Section], names: Mapping[str, int], specs: Sequence[MergeSpec]
) -> list[int]:
    """Return the documents' positions, each after those it needs, the result last."""
    needs = [[names[name] for name in spec.documents] for spec in specs]
    order: list[int] = []
    on_the_way: list[int] = []

    def visit(i: int) -> None:
        if i in order:
            return
        if i in on_the_way:
            circle = [specs[k].name for k in on_the_way[on_the_way.index(i) :]] + [specs[i].name]
            raise sections[i].error(
                f"documents need each other in a circle: {' needs '.join(map(repr, circle))}",
                "name",
            )
        on_the_way.append(i)
        for needed in needs[i]:
            visit(needed)
        on_the_way.pop()
        order.append(i)

    for i in range(len(specs)):
        visit(i)
    used = {i for needed in needs for i in needed}
    unused = [i for i in range(len(specs)) if i not in used]
    result = next((i for i in unused if specs[i].name is None), unused[-1])
    for i in unused:
        if i != result:
            raise sections[i].error(
                f"no document uses {specs[i].name!r}, and the result is "
                f"{specs[result].name or 'the one without a name'!r}; remove one of the two",
                "name",
            )
    return order if order[-1] == result else [i for i in order if i != result] + [result]


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


def read_parameters(
    section: Section, method: MergeMethod, num_models: int, key: str = "parameters"
) -> dict[str, Any]:
    """Return a method's parameters by Python name, the same for all models and tensors.

    Args:
        section: Its ``key`` holds them.
        method: Whose parameters they are.
        num_models: Number of models without the base.
        key: Name of the mapping in ``section``.

    Raises:
        RecipeError: A parameter is unknown, missing or out of range, or changes over the tensors.
    """
    shared = section.section(key)
    settings = _read_settings(shared, method, num_models)
    out: dict[str, Any] = {}
    for name, parameter in method.parameters.items():
        setting = settings.get(parameter.kind.key)
        if setting is None:
            if parameter.required:
                raise (shared or section).error(
                    f"{method.name} needs parameter {parameter.kind.key!r}"
                )
            continue
        if len(setting.anchors) != 1:
            raise shared.error(
                f"{shared.path_of(parameter.kind.key)}: lists and filters are not supported here; "
                "give one value",
                parameter.kind.key,
            )
        value = setting.anchors[0]
        out[name] = [value] * num_models if parameter.kind.per_model else value
    return out


def _read_settings(
    section: Section | None, method: MergeMethod, num_models: int, *, own: bool = False
) -> dict[str, Setting]:
    """Return the settings in ``section`` by their keys, each value checked.

    Args:
        section: Holds nothing but parameters; None holds none.
        method: Whose they are.
        num_models: Number of models without the base.
        own: Whether it is one model's section: only per-model parameters may be there.
    """
    if section is None:
        return {}
    kinds = [p.kind for p in method.parameters.values()]
    known = [k.key for k in kinds if k.per_model or not own]
    known += [method.statistics] if own and method.statistics else []
    refused = {
        k.key: "is one for all models; it goes into the parameters of the merge or of the slice"
        for k in kinds
        if k.key not in known
    }
    if method.statistics and not own:
        refused[method.statistics] = "is each model's own; it goes into the model's parameters"
    section.allow_only(known, tolerated=_WITHOUT_EFFECT, refused=refused)
    out: dict[str, Setting] = {}
    for kind in kinds:
        if kind.key not in section:
            continue
        try:
            out[kind.key] = Setting.of(
                section.value(kind.key), lambda value, kind=kind: kind.check(value, num_models)
            )
        except SettingError as error:
            raise section.error_inside(kind.key, error.place, error.before, error.after) from None
    return out


class _Reader:
    """Reads one document of a recipe."""

    def __init__(self, section: Section, documents: set[str]):
        self.recipe = section
        self.models = ModelReader(documents - {section.text("name", None)})

    def read(self) -> MergeSpec:
        recipe = self.recipe
        recipe.allow_only(_KEYS)
        self.method = read_method(recipe, "merge_method")
        self.base = self.models.read(recipe, "base_model") if "base_model" in recipe else None
        if self.base is None and self.method.needs_base:
            raise recipe.error(f"{self.method.name} needs a base_model", "merge_method")
        given = [key for key in _CONTENTS if key in recipe]
        if len(given) != 1:
            found = " and ".join(given) if given else "none of them"
            raise recipe.error(
                f"expected one of models, slices and modules, got {found}",
                given[1] if given else None,
            )
        shared = recipe.section("parameters")
        # Which keys are there decides what else is missing; values need the number of models.
        self.shared = shared.keys if shared is not None else []
        self.counts: list[int] = []
        if "modules" in recipe:
            modules = self.modules(recipe.section("modules"))
        else:
            modules = (self.module(recipe, None),)
        parameters = _read_settings(shared, self.method, max(self.counts))
        return MergeSpec(
            self.method.name,
            modules,
            self.base,
            parameters,
            read_dtype(recipe, "dtype"),
            read_dtype(recipe, "out_dtype"),
            self.tokenizer(modules),
            self.chat_template(),
            recipe.text("name", None),
        )

    def modules(self, section: Section) -> tuple[Module, ...]:
        section.allow_only([*MODULES, DEFAULT_MODULE])
        if not section.keys:
            raise section.error("expected modules to name at least one module, got none")
        return tuple(self.module(section.section(name), name) for name in section.keys)

    def module(self, section: Section, name: str | None) -> Module:
        """Read what is merged from ``models`` or ``slices``: of a module, or of the recipe."""
        own = None
        if name is not None:
            section.allow_only(("models", "slices", "parameters"))
            if ("models" in section) == ("slices" in section):
                raise section.error(f"expected {section.where} to have either models or slices")
            own = section.section("parameters")
        levels = (own,)
        if "models" in section:
            slices = (self.piece(section, "models", levels),)
        else:
            entries = section.sections("slices")
            slices = tuple(self.slice(entry, levels) for entry in entries)
            if len(slices) > 1:
                for entry, piece in zip(entries, slices, strict=True):
                    if not piece.is_layered:
                        raise entry.error(
                            f"key 'layer_range' is missing in {entry.where}.sources[0]"
                        )
        return Module(name, slices, _read_settings(own, self.method, max(self.counts)))

    def slice(self, entry: Section, levels: tuple[Section | None, ...]) -> Slice:
        entry.allow_only(("sources", "parameters"))
        return self.piece(entry, "sources", (entry.section("parameters"), *levels))

    def piece(self, section: Section, key: str, levels: tuple[Section | None, ...]) -> Slice:
        """Read a slice whose sources are under ``key``; ``levels`` are the parameters above them.

        A recipe's models are one slice of whole models.
        """
        entries = section.sections(key)
        layered = key == "sources"
        models = self.distinct(entries, layered)
        taken = self.base if self.method.takes_base else None
        count = len([model for model in models if model != taken])
        if key == "models" and taken is None and self.base is not None and self.base not in models:
            # A base that the method does not set apart is one more model.
            hint = (
                f"; base_model is one of them, as {self.method.name} takes no base: list it under "
                "models, or leave it out"
            )
            self.check_required(section, {}, levels, hint)
            models.append(self.base)
            count += 1
        if count == 0:
            raise section.error(f"{self.method.name} needs a model besides the base", key)
        try:
            self.method.check_count(count)
        except ValueError as error:
            raise section.error(f"{section.path_of(key)}: {error}", key) from None
        self.counts.append(count)
        sources = []
        for entry, model in zip(entries, models, strict=False):
            own = entry.section("parameters")
            settings = _read_settings(own, self.method, count, own=True)
            if model != taken:
                self.check_required(own or entry, settings, levels)
            sources.append(
                Source(model, self.layers(entry) if layered else None, settings, self.folder(own))
            )
        sources += [Source(model) for model in models[len(entries) :]]
        self.check_lengths(entries, sources)
        shared = _read_settings(levels[0], self.method, count) if layered else {}
        return Slice(tuple(sources), shared)

    def distinct(self, entries: Sequence[Section], layered: bool) -> list[ModelRef]:
        """Read the entries' models; the same one may not come twice."""
        seen: dict[ModelRef, str] = {}
        for entry in entries:
            keys = ("model", "layer_range", "parameters")
            entry.allow_only(
                keys if layered else ("model", "parameters"),
                refused={"layer_range": "ranges of layers go under slices"},
            )
            model = self.models.read(entry, "model")
            if model in seen:
                raise entry.error(f"{entry.path_of('model')} is {seen[model]} again", "model")
            seen[model] = entry.path_of("model")
        return list(seen)

    def check_required(
        self,
        place: Section,
        settings: Settings,
        levels: Iterable[Section | None],
        hint: str = "",
    ) -> None:
        """Check that parameters without a default are given to a model, by itself or above it."""
        above = {key for level in levels if level is not None for key in level.keys}
        for parameter in self.method.parameters.values():
            key = parameter.kind.key
            if not parameter.required or key in above or key in self.shared:
                continue
            needs = f"{self.method.name} needs parameter {key!r}"
            if not parameter.kind.per_model:
                raise self.recipe.error(needs, "merge_method")
            if key not in settings:
                raise place.error(f"{needs} of each model{hint}")

    def layers(self, entry: Section) -> tuple[int, int] | None:
        if "layer_range" not in entry:
            return None
        value = entry.value("layer_range")
        numbers = isinstance(value, list) and all(type(item) is int for item in value)
        if not numbers or len(value) != 2 or not 0 <= value[0] < value[1]:
            raise entry.expect(
                "layer_range", "[first layer, layer after the last], as [0, 16]", value
            )
        return value[0], value[1]

    def check_lengths(self, entries: Sequence[Section], sources: Sequence[Source]) -> None:
        first = sources[0].layers
        for entry, source in zip(entries, sources, strict=False):
            if (source.layers is None) != (first is None):
                raise entry.error(
                    f"expected all or none of a slice's sources to have a layer_range, "
                    f"unlike {entry.where}"
                )
            if first is not None:
                wanted, found = (b - a for a, b in (first, source.layers))
                if wanted != found:
                    raise entry.expect(
                        "layer_range",
                        f"of {wanted} layers, as its neighbours are",
                        [*source.layers],
                    )

    def folder(self, section: Section | None) -> Path | None:
        """Read a model's statistics folder."""
        if section is None or not self.method.statistics:
            return None
        return section.folder(self.method.statistics, None)

    def tokenizer(self, modules: Sequence[Module]) -> TokenizerSpec | None:
        """Read the vocabulary; the models it speaks of must be among those that are merged.

        One that is merged with an adapter may be named without.
        """
        tokenizer = read_tokenizer(self.recipe, self.models)
        merged = [s.model for module in modules for piece in module.slices for s in piece.sources]
        merged += [] if self.base is None else [self.base]
        plain = {replace(model, adapter=None): model for model in reversed(merged)}

        def found(model: ModelRef) -> ModelRef:
            if model in merged or model in plain:
                return model if model in merged else plain[model]
            key = "tokenizer" if "tokenizer" in self.recipe else "tokenizer_source"
            raise self.recipe.error(f"{key}: {model} is none of the models to merge", key)

        return None if tokenizer is None else tokenizer.with_models(found)

    def chat_template(self) -> str | None:
        text = self.recipe.text("chat_template", None)
        if text is None or text in CHAT_TEMPLATES or "{%" in text or "{{" in text:
            return text
        hint = nearest(text, CHAT_TEMPLATES)
        raise self.recipe.error(
            f"chat_template {text!r} is neither a template nor the name of one{hint}",
            "chat_template",
        )

"""What a merge is asked to do: models, the layers taken from each, and parameters."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import mergeme_ext.merging.methods  # noqa: F401  (registers them)
from mergeme_ext.io import dtype_name, portable_name
from mergeme_ext.merging import registry
from mergeme_ext.merging.settings import Setting

__all__ = [
    "DTYPES",
    "MergeSpec",
    "ModelRef",
    "ModelToken",
    "Module",
    "Slice",
    "Source",
    "TokenRule",
    "TokenizerSpec",
]

DTYPES = {dtype_name(d): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
# By key in recipes.
Settings = Mapping[str, Setting]


@dataclass(frozen=True)
class ModelRef:
    """A model to read. Two are equal if they mean the same folders, however these are written.

    Attributes:
        path: The model's folder. For another merge's result it is a stand-in until
            ``MergeSpec.with_documents`` puts the folder in.
        adapter: Folder of a LoRA adapter to apply to it.
        document: Name of the merge of the same recipe file whose result this is.
    """

    path: Path = field(compare=False)
    adapter: Path | None = field(default=None, compare=False)
    document: str | None = None
    _real: tuple[str, str | None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        adapter = None if self.adapter is None else os.path.realpath(self.adapter)
        object.__setattr__(self, "_real", (os.path.realpath(self.path), adapter))

    @classmethod
    def of(cls, model: "ModelRef | str | Path") -> "ModelRef":
        """Return a reference to a folder, or what is one already."""
        return model if isinstance(model, ModelRef) else cls(Path(model))

    @property
    def name(self) -> str:
        """What to call it in public, never a path; a recipe can say it."""
        model = self.document or portable_name(self.path)
        return model if self.adapter is None else f"{model}+{portable_name(self.adapter)}"

    def __str__(self) -> str:
        path = self.document or str(self.path)
        return path if self.adapter is None else f"{path}+{self.adapter}"


@dataclass(frozen=True)
class Source:
    """One model's part in a slice.

    Attributes:
        model: The model.
        layers: Its layers, from the first to the one after the last; None for all.
        parameters: For this model alone.
        statistics: Folder of this model's statistics, if the method takes any.
    """

    model: ModelRef
    layers: tuple[int, int] | None = None
    parameters: Settings = field(default_factory=dict)
    statistics: Path | None = None

    def document(self, method: registry.MergeMethod) -> dict[str, Any]:
        """Return it as plain data."""
        out: dict[str, Any] = {"model": self.model.name}
        if self.layers is not None:
            out["layer_range"] = list(self.layers)
        parameters = _settings_document(self.parameters)
        if self.statistics is not None:
            parameters[method.statistics] = portable_name(self.statistics)
        return out | ({"parameters": parameters} if parameters else {})


@dataclass(frozen=True)
class Slice:
    """A stretch of layers of the result, and what it is merged from."""

    sources: tuple[Source, ...]
    parameters: Settings = field(default_factory=dict)

    @property
    def is_layered(self) -> bool:
        """Whether it takes a range of layers, rather than whole models."""
        return self.sources[0].layers is not None


@dataclass(frozen=True)
class Module:
    """A part of the result, such as ``text_decoder``; None as name means all of it."""

    name: str | None
    slices: tuple[Slice, ...]
    parameters: Settings = field(default_factory=dict)

    def document(self, method: registry.MergeMethod) -> dict[str, Any]:
        """Return it as plain data: its models or slices."""
        slices = [
            {"sources": [source.document(method) for source in piece.sources]}
            | _parameters_entry(piece.parameters)
            for piece in self.slices
        ]
        first = self.slices[0]
        if len(slices) == 1 and not first.is_layered and not first.parameters:
            return {"models": slices[0]["sources"]} | _parameters_entry(self.parameters)
        return {"slices": slices} | _parameters_entry(self.parameters)


@dataclass(frozen=True)
class ModelToken:
    """A token's embedding in one model, by its text there or by its id."""

    model: ModelRef
    token: str | None = None
    token_id: int | None = None

    def document(self) -> dict[str, Any]:
        """Return it as plain data."""
        which = {"token": self.token} if self.token is not None else {"token_id": self.token_id}
        return {"kind": "model_token", "model": self.model.name} | which


@dataclass(frozen=True)
class TokenRule:
    """Where a token's embedding comes from.

    Attributes:
        source: A model, a token of a model, ``zero``, or None for what would be done anyway.
        force: Use it for models too that know the token themselves.
    """

    source: ModelRef | ModelToken | str | None = None
    force: bool = False

    def document(self) -> dict[str, Any]:
        """Return it as plain data."""
        source: Any = self.source
        if isinstance(source, ModelRef):
            source = source.name
        elif isinstance(source, ModelToken):
            source = source.document()
        elif source is not None:
            source = {"kind": source}
        out = {} if source is None else {"source": source}
        return out | ({"force": True} if self.force else {})


@dataclass(frozen=True)
class TokenizerSpec:
    """The vocabulary of the result.

    Attributes:
        source: ``union`` of all models' vocabularies, ``base``, or the model whose it is.
        tokens: Rules for single tokens.
        pad_to_multiple_of: Rows of the embedding are rounded up to a multiple of this.
    """

    source: ModelRef | str = "union"
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None

    @property
    def references(self) -> tuple[ModelRef, ...]:
        """The models it names, each once."""
        out = [self.source] if isinstance(self.source, ModelRef) else []
        for rule in self.tokens.values():
            source = rule.source
            out += [source.model] if isinstance(source, ModelToken) else []
            out += [source] if isinstance(source, ModelRef) else []
        return tuple(dict.fromkeys(out))

    def with_models(self, replaced: Callable[[ModelRef], ModelRef]) -> "TokenizerSpec":
        """Return it with every model that it names replaced."""

        def source_of(source: ModelRef | ModelToken | str | None) -> Any:
            if isinstance(source, ModelToken):
                return replace(source, model=replaced(source.model))
            return replaced(source) if isinstance(source, ModelRef) else source

        tokens = {
            token: replace(rule, source=source_of(rule.source))
            for token, rule in self.tokens.items()
        }
        return replace(self, source=source_of(self.source), tokens=tokens)

    def document(self) -> dict[str, Any]:
        """Return it as plain data."""
        source = self.source.name if isinstance(self.source, ModelRef) else self.source
        out: dict[str, Any] = {"source": source}
        if self.tokens:
            out["tokens"] = {token: rule.document() for token, rule in self.tokens.items()}
        if self.pad_to_multiple_of is not None:
            out["pad_to_multiple_of"] = self.pad_to_multiple_of
        return out


@dataclass(frozen=True)
class MergeSpec:
    """One merge.

    Attributes:
        method: Name of a registered method.
        modules: What the result is made of; one without a name unless the recipe has modules.
        base: The base; its configuration and tokenizer go into the result. Without one, the first
            model's do.
        parameters: For the whole merge.
        dtype: Inputs are taken as if they had it; None takes them as they are.
        out_dtype: Of the result's floating tensors; None means ``dtype``, or else the lead's.
        tokenizer: The vocabulary, if it is to be another than the lead's.
        chat_template: ``auto``, a known template's name, or a template.
        name: What other documents of the recipe call the result.
    """

    method: str
    modules: tuple[Module, ...]
    base: ModelRef | None = None
    parameters: Settings = field(default_factory=dict)
    dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None
    tokenizer: TokenizerSpec | None = None
    chat_template: str | None = None
    name: str | None = None

    @classmethod
    def of_models(
        cls,
        method: str,
        models: Sequence[ModelRef | str | Path],
        base: ModelRef | str | Path | None = None,
        parameters: Mapping[str, Any] | None = None,
        **rest: Any,
    ) -> "MergeSpec":
        """Return the merge of whole ``models`` by ``method``.

        Args:
            method: Name of a registered method.
            models: Folders or references. A base is not counted among them if the method sets one
                apart; ``linear``, for one, averages it if it is listed.
            base: Folder of the base, or a reference to it.
            parameters: By Python name; a per-model one is one number for all models or one for
                each.
            rest: Further attributes.

        Raises:
            TypeError: A parameter is unknown, or one without a default is missing.
            ValueError: A value is out of range, or there are too few or too many models.
        """
        chosen, parameters = registry.get(method), parameters or {}
        base = None if base is None else ModelRef.of(base)
        if not models:
            raise ValueError(f"{method}: expected at least one model, got none")
        if chosen.needs_base and base is None:
            raise ValueError(f"{method}: expected a base, got None")
        every = [ModelRef.of(model) for model in models]
        merged = [model for model in every if not (chosen.takes_base and model == base)]
        chosen.bind(len(merged), parameters)
        shared: dict[str, Setting] = {}
        own: dict[ModelRef, dict[str, Setting]] = {model: {} for model in every}
        for name, value in parameters.items():
            kind = chosen.parameters[name].kind
            if kind.per_model and isinstance(value, Sequence) and not isinstance(value, str):
                for model, one in zip(merged, value, strict=True):
                    own[model][kind.key] = Setting((one,))
            else:
                shared[kind.key] = Setting((value,))
        sources = tuple(Source(model, parameters=own[model]) for model in every)
        return cls(method, (Module(None, (Slice(sources),)),), base, shared, **rest)

    @property
    def slices(self) -> Iterator[Slice]:
        """The slices of all modules."""
        return (piece for module in self.modules for piece in module.slices)

    @property
    def references(self) -> tuple[ModelRef, ...]:
        """The models whose weights it reads, each once, the lead first."""
        out = [] if self.base is None else [self.base]
        out += [source.model for piece in self.slices for source in piece.sources]
        return tuple(dict.fromkeys(out))

    @property
    def lead(self) -> ModelRef:
        """The base, or else the first model: gives order, configuration and companion files."""
        return self.references[0]

    @property
    def models(self) -> tuple[ModelRef, ...]:
        """The models that are merged, each once; not the base if the method takes one."""
        left_out = self.base if registry.get(self.method).takes_base else None
        listed = [source.model for piece in self.slices for source in piece.sources]
        return tuple(dict.fromkeys(model for model in listed if model != left_out))

    @property
    def documents(self) -> tuple[str, ...]:
        """Names of the other merges whose results it reads, each once."""
        every = self.references + (self.tokenizer.references if self.tokenizer else ())
        return tuple(dict.fromkeys(r.document for r in every if r.document is not None))

    @property
    def result_dtype(self) -> torch.dtype | None:
        """Of the result's floating tensors; None keeps the lead's."""
        return self.out_dtype or self.dtype

    def with_default_seed(self, seed: int) -> "MergeSpec":
        """Return this merge with ``seed`` for a method that takes one, unless the recipe has it."""
        takes_one = any(p.kind.key == "seed" for p in registry.get(self.method).parameters.values())
        if not takes_one or "seed" in self.parameters:
            return self
        return replace(self, parameters={**self.parameters, "seed": Setting((seed,))})

    def with_documents(self, folders: Mapping[str, str | Path]) -> "MergeSpec":
        """Return this merge with the results of others in their places.

        Args:
            folders: From the names in ``documents`` to folders.

        Raises:
            KeyError: One is missing.
        """

        def placed(model: ModelRef) -> ModelRef:
            if model.document is None:
                return model
            return replace(model, path=Path(folders[model.document]))

        modules = tuple(
            replace(
                module,
                slices=tuple(
                    replace(
                        piece,
                        sources=tuple(replace(s, model=placed(s.model)) for s in piece.sources),
                    )
                    for piece in module.slices
                ),
            )
            for module in self.modules
        )
        return replace(
            self,
            modules=modules,
            base=None if self.base is None else placed(self.base),
            tokenizer=None if self.tokenizer is None else self.tokenizer.with_models(placed),
        )

    def document(self) -> dict[str, Any]:
        """Return the recipe as plain data, with models by public name instead of by path."""
        method = registry.get(self.method)
        out: dict[str, Any] = {} if self.name is None else {"name": self.name}
        out["merge_method"] = self.method
        if self.base is not None:
            out["base_model"] = self.base.name
        if self.modules[0].name is None:
            out |= self.modules[0].document(method)
        else:
            out["modules"] = {m.name: m.document(method) for m in self.modules}
        out |= _parameters_entry(self.parameters)
        for key in ("dtype", "out_dtype"):
            if (dtype := getattr(self, key)) is not None:
                out[key] = dtype_name(dtype)
        if self.tokenizer is not None:
            out["tokenizer"] = self.tokenizer.document()
        if self.chat_template is not None:
            out["chat_template"] = self.chat_template
        return out


def _settings_document(settings: Settings) -> dict[str, Any]:
    return {key: setting.document() for key, setting in settings.items()}


def _parameters_entry(settings: Settings) -> dict[str, Any]:
    return {"parameters": _settings_document(settings)} if settings else {}

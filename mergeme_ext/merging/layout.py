"""Lays a merge out: which tensor of the result is made of which, and with what parameters."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergeme_ext.io import CheckpointError, CheckpointSource, names, with_dtype
from mergeme_ext.io.operands import same_values
from mergeme_ext.merging import registry
from mergeme_ext.merging.layered_config import OriginalLayer, rederive
from mergeme_ext.merging.layers import (
    PREDICTORS,
    Stack,
    find_stacks,
    layer_section,
    main_stack,
    position,
)
from mergeme_ext.merging.settings import first_value
from mergeme_ext.merging.spec import MergeSpec, ModelRef, Module, Slice, Source

__all__ = ["Assignment", "Layout", "lay_out"]

_TIE = "tie_word_embeddings"
# A tensor that plays a part in the result: what it is called in its model, which decides on
# filters, and what it is stored as. They differ for a tied head.
Aliases = Mapping[str, str]


@dataclass(frozen=True)
class Assignment:
    """One tensor of the result.

    Attributes:
        name: Its name in the result.
        base: What the base's tensor is stored as; None if no base goes in.
        models: The models that are merged, the base not among them if the method sets it apart.
        names: What their tensors are stored as.
        parameters: By Python name, bound for just these models.
        statistics: Folder of each model's statistics, if any.
    """

    name: str
    base: str | None
    models: tuple[ModelRef, ...]
    names: tuple[str, ...]
    parameters: dict[str, Any]
    statistics: tuple[Path | None, ...] = ()


@dataclass(frozen=True)
class Layout:
    """What a merge comes to, tensor by tensor.

    Attributes:
        assignments: The result's tensors; in the order in which the lead has them on disk, as far
            as it has them.
        config: The result's ``config.json``; empty if the lead has none.
        left_out: For each model, tensors that the recipe leaves out, and why.
        leftovers: For each model, tensors that nothing accounts for.
        notes: What the user should know.
    """

    assignments: list[Assignment]
    config: dict[str, Any]
    left_out: dict[ModelRef, dict[str, str]] = field(default_factory=dict)
    leftovers: dict[ModelRef, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def lay_out(
    spec: MergeSpec,
    sources: Mapping[ModelRef, CheckpointSource],
    *,
    allow_crimes: bool = False,
) -> Layout:
    """Return how ``spec`` makes the result's tensors out of those of ``sources``.

    Only names decide; shapes and dtypes are the engine's. Layers within one model may hold
    different tensors.

    Args:
        spec: What is asked for.
        sources: Every model of ``spec.references``, opened.
        allow_crimes: Merge models of different ``model_type`` too.

    Raises:
        CheckpointError: The models' tensors do not fit together as ``spec`` wants.
        ValueError: A parameter has no value for some tensor, or one out of range.
    """
    if not allow_crimes:
        _check_kinds(spec, sources)
    return _Planner(spec, sources).lay_out()


def _check_kinds(spec: MergeSpec, sources: Mapping[ModelRef, CheckpointSource]) -> None:
    for model in spec.references:
        kinds = [sources[m].config.get("model_type") for m in (spec.lead, model)]
        if None not in kinds and kinds[0] != kinds[1]:
            raise CheckpointError(
                f"{model} is a {kinds[1]} model, {spec.lead} a {kinds[0]} model; "
                "only models of one kind merge"
            )


@dataclass(frozen=True)
class _Cut:
    """A module of one model, taken apart.

    Attributes:
        before: Names of tensors that are used before the layers.
        stack: The layers; None if there is none, or no telling which.
        after: All other names outside the layers.
    """

    before: Sequence[str]
    stack: Stack | None
    after: Sequence[str]


class _Planner:
    """Fills one ``Layout``."""

    def __init__(self, spec: MergeSpec, sources: Mapping[ModelRef, CheckpointSource]):
        self.spec, self.sources = spec, sources
        self.method = registry.get(spec.method)
        self.base = spec.base if self.method.takes_base else None
        self.rows = {m: names.vocabulary_names(sources[m].names) for m in spec.references}
        self.aliases = resolve_heads({m: sources[m] for m in spec.references}, self.rows)
        self.read: dict[ModelRef, set[str]] = {model: set() for model in spec.references}
        self.why: dict[ModelRef, dict[str, str]] = {model: {} for model in spec.references}
        self.notes: list[str] = []
        self.assignments: list[Assignment] = []
        self.filtered: set[str] = set()  # names that filters were tried on
        self.bound: dict[Any, dict[str, Any]] = {}
        self.config = with_dtype(sources[spec.lead].config, spec.result_dtype)

    def lay_out(self) -> Layout:
        self.leave_out_rotary_tables()
        for module in self.spec.modules:
            if module.slices[0].is_layered:
                self.stack_slices(module)
            else:
                self.merge_whole(module)
        self.untie()
        self.note_bases_parameters()
        self.note_idle_filters()
        left_out, leftovers = self.account()
        return Layout(self.assignments, self.config, left_out, leftovers, self.notes)

    def untie(self) -> None:
        """Make the configuration say that the result has a head of its own, if it has."""
        rows = self.rows[self.spec.lead]
        made = {assignment.name for assignment in self.assignments}
        head = head_name(self.rows.values())
        if not self.config or head not in made:
            return
        if self.aliases[self.spec.lead].get(head) == rows.embedding:
            self.config[_TIE] = False
        for part in (self.config, self.config.get("text_config")):
            if isinstance(part, dict) and part.get(_TIE):
                part[_TIE] = False

    # What is whose

    def leave_out_rotary_tables(self) -> None:
        """Leave out tables that follow from the configuration, unless every model has them."""
        tables = [{n for n in a if names.is_rotary_table(n)} for a in self.aliases.values()]
        everywhere = set.intersection(*tables)
        for model, aliases in self.aliases.items():
            for name in [n for n in aliases if names.is_rotary_table(n) and n not in everywhere]:
                self.why[model][aliases.pop(name)] = "a table that config.json determines"

    def members(self, module: Module, model: ModelRef) -> dict[str, str]:
        """Return the tensors of ``model`` that belong to ``module``: names and stored names."""
        aliases = self.aliases[model]
        if module.name is None:
            return dict(aliases)
        chosen = [m.name for m in self.spec.modules]
        wanted = None if module.name not in names.MODULES else module.name
        return {n: s for n, s in aliases.items() if names.module_of(n, chosen) == wanted}

    def participants(self, piece: Slice) -> list[Source]:
        """Return the slice's sources, the base in front if the method sets one apart."""
        if self.base is None:
            return list(piece.sources)
        listed = [s for s in piece.sources if s.model == self.base]
        base = listed[0] if listed else Source(self.base, piece.sources[0].layers)
        return [base, *(s for s in piece.sources if s.model != self.base)]

    # Whole models

    def merge_whole(self, module: Module) -> None:
        (piece,) = module.slices
        lead_model = self.spec.base or piece.sources[0].model
        lead = self.members(module, lead_model)
        if not lead:
            raise CheckpointError(f"{lead_model} has no tensors of module {module.name!r}")
        every = list(dict.fromkeys([lead_model, *(s.model for s in piece.sources)]))
        for name in self.leave_out_predictors(module, every):
            lead.pop(name, None)
        stacks = find_stacks(lead, self.sources[lead_model].config)
        for model in every[1:]:
            self.check_same_names(lead_model, lead, stacks, model, self.members(module, model))
        positions = {
            name: stack.position(i)
            for stack in stacks
            for i, layer in enumerate(stack.layers)
            for name in layer.values()
        }
        models = [s for s in piece.sources if s.model != self.base]
        for name in _by_place(self.sources[lead_model], lead):
            self.assign(
                name,
                None if self.spec.base is None else name,
                models,
                [name] * len(models),
                piece,
                module,
                positions.get(name, 0.0),
            )

    def leave_out_predictors(self, module: Module, models: Sequence[ModelRef]) -> set[str]:
        """Leave out layers that predict further tokens, unless every model has them.

        Fine-tuning often loses them.
        """
        predictors: dict[ModelRef, set[str]] = {}
        for model in models:
            stacks = find_stacks(self.members(module, model), self.sources[model].config)
            predictors[model] = {name for stack in stacks for name in stack.beyond}
        kept = set.intersection(*predictors.values())
        lost = set.union(*predictors.values()) - kept
        for model, found in predictors.items():
            for name in found & lost:
                self.leave_out(model, name, "it comes after the layers proper, not in all models")
        if lost and not kept and self.config.get(PREDICTORS):
            self.config[PREDICTORS] = 0
        return lost

    def check_same_names(
        self,
        lead_model: ModelRef,
        lead: Collection[str],
        stacks: Sequence[Stack],
        model: ModelRef,
        found: Collection[str],
    ) -> None:
        """Check that a model has all of the lead's tensors; more are leftovers."""
        here, there = lead_model, model
        others = {s.prefix: s for s in find_stacks(found, self.sources[model].config)}
        for stack in stacks:
            if stack.prefix in others and len(others[stack.prefix]) != len(stack):
                raise CheckpointError(
                    f"{there} has {len(others[stack.prefix])} layers, {here} has {len(stack)}"
                )
        if missing := [name for name in lead if name not in found]:
            check_same_storage(here, lead, there, found)
            raise CheckpointError(f"{there} has no tensor {_first_of(missing)}, which {here} has")

    # Slices

    def stack_slices(self, module: Module) -> None:
        cuts: dict[ModelRef, _Cut] = {}
        for source in (s for piece in module.slices for s in self.participants(piece)):
            if source.model not in cuts:
                cuts[source.model] = self.cut(module, source.model)
        lead_model = self.spec.lead if self.spec.lead in cuts else module.slices[0].sources[0].model
        prefix = cuts[lead_model].stack.prefix
        first, last = module.slices[0], module.slices[-1]
        self.assign_outside(module, first, {m: c.before for m, c in cuts.items()}, "first")
        layers: list[list[OriginalLayer]] = []
        for piece in module.slices:
            participants = self.participants(piece)
            for source in participants:
                self.check_range(source, cuts[source.model].stack)
            start, end = participants[0].layers
            for step in range(end - start):
                t = position(step, end - start)
                at = f"{prefix}{len(layers)}"
                self.assign_layer(module, piece, participants, cuts, step, at, t)
                layers.append(
                    [
                        self.original(module, source.model, cuts[source.model].stack, step, source)
                        for source in participants
                    ]
                )
        self.assign_outside(module, last, {m: c.after for m, c in cuts.items()}, "last")
        self.note_tied_head(first, last)
        self.adapt_config(module, lead_model, cuts[lead_model].stack, layers)
        self.explain_left_out(module, cuts)

    def cut(self, module: Module, model: ModelRef) -> _Cut:
        found = self.members(module, model)
        source = self.sources[model]
        if module.name is None:
            parts = {names.module_of(name) for name in found} - {None}
            if len(parts) > 1:
                raise CheckpointError(
                    f"{model} is made of {', '.join(sorted(parts))}; put each one's slices "
                    "or models under modules"
                )
        stacks = find_stacks(found, source.config)
        stack = main_stack(stacks, source.config)
        if stack is None:
            what = ", ".join(f"{s.prefix}* ({len(s)})" for s in stacks) or "none"
            raise CheckpointError(
                f"{model}: expected one stack of layers to take slices from, got {what}"
            )
        inside = {name for layer in stack.layers for name in layer.values()} | set(stack.beyond)
        outside = [name for name in _by_place(source, found) if name not in inside]
        before = [name for name in outside if names.is_before_layers(name)]
        return _Cut(before, stack, [name for name in outside if name not in set(before)])

    def check_range(self, source: Source, stack: Stack) -> None:
        start, end = source.layers
        if end > len(stack):
            raise CheckpointError(
                f"layer_range [{start}, {end}] goes past the {len(stack)} layers of {source.model}"
            )

    def assign_outside(
        self, module: Module, piece: Slice, wanted: Mapping[ModelRef, Sequence[str]], which: str
    ) -> None:
        """Assign what comes before or after the layers; it is merged as the slice at that end is.

        Args:
            module: The module.
            piece: Its first or last slice.
            wanted: Each model's names there.
            which: Of the two ends.
        """
        participants = self.participants(piece)
        lead = participants[0].model
        for source in participants[1:]:
            if missing := [n for n in wanted[lead] if n not in set(wanted[source.model])]:
                raise CheckpointError(
                    f"{source.model} has no tensor {_first_of(missing)}, which {lead} has"
                )
        models = [s for s in participants if s.model != self.base]
        for name in wanted[lead]:
            base = None if self.base is None else name
            self.assign(name, base, models, [name] * len(models), piece, module, 0.0)
        inside = {s.model for s in participants}
        for model, names_there in wanted.items():
            if model not in inside:
                for name in names_there:
                    self.leave_out(model, name, f"it comes from the {which} slice's models")

    def assign_layer(
        self,
        module: Module,
        piece: Slice,
        participants: Sequence[Source],
        cuts: Mapping[ModelRef, _Cut],
        step: int,
        at: str,
        t: float,
    ) -> None:
        """Assign one layer of the result, whose tensors' names begin with ``at``."""
        layers = [cuts[s.model].stack.layers[s.layers[0] + step] for s in participants]
        for source, layer in zip(participants[1:], layers[1:], strict=True):
            self.check_same_layer(participants[0], layers[0], source, layer, step)
        for rest in layers[0]:
            found = [
                (source, layer[rest]) for source, layer in zip(participants, layers, strict=True)
            ]
            base = None if self.base is None else found.pop(0)[1]
            self.assign(
                at + rest, base, [s for s, _ in found], [n for _, n in found], piece, module, t
            )

    def check_same_layer(
        self,
        first: Source,
        wanted: Mapping[str, str],
        other: Source,
        found: Mapping[str, str],
        step: int,
    ) -> None:
        for has, has_layer, lacks, lacks_layer in (
            (first, wanted, other, found),
            (other, found, first, wanted),
        ):
            if missing := [rest for rest in has_layer if rest not in lacks_layer]:
                check_same_storage(has.model, has_layer, lacks.model, lacks_layer)
                raise CheckpointError(
                    f"layer {lacks.layers[0] + step} of {lacks.model} has no "
                    f"{_first_of([rest.lstrip('.') for rest in missing])}, which layer "
                    f"{has.layers[0] + step} of {has.model} has: they are "
                    "different kinds of layers"
                )

    def note_tied_head(self, first: Slice, last: Slice) -> None:
        made = {assignment.name for assignment in self.assignments}
        models = [{s.model for s in piece.sources} for piece in (first, last)]
        embedding, head = self.rows[self.spec.lead].embedding, head_name(self.rows.values())
        if embedding in made and head not in made and models[0] != models[1]:
            self.notes.append(
                f"the head is tied to {embedding}, so it too comes from the first slice's models"
            )

    def original(
        self, module: Module, model: ModelRef, stack: Stack, step: int, source: Source
    ) -> OriginalLayer:
        found = layer_section(self.sources[model].config, stack, module.name)
        section = found[0] if found else {}
        return OriginalLayer(section, source.layers[0] + step, str(model))

    def adapt_config(
        self,
        module: Module,
        lead: ModelRef,
        stack: Stack,
        layers: Sequence[Sequence[OriginalLayer]],
    ) -> None:
        if not self.config:
            return
        found = layer_section(self.config, stack, module.name)
        if found is None:
            raise CheckpointError(
                f"{lead}: config.json nowhere says that there are {len(stack)} "
                f"layers {stack.prefix}*, so it cannot be made to say {len(layers)}"
            )
        rederive(*found, layers)

    def explain_left_out(self, module: Module, cuts: Mapping[ModelRef, _Cut]) -> None:
        for model, cut in cuts.items():
            for i, layer in enumerate(cut.stack.layers):
                for name in layer.values():
                    self.leave_out(model, name, f"layer {i} is in no slice")
            for name in cut.stack.beyond:
                self.leave_out(model, name, f"it comes after the {len(cut.stack)} layers proper")

    # Both

    def assign(
        self,
        name: str,
        base: str | None,
        models: Sequence[Source],
        inputs: Sequence[str],
        piece: Slice,
        module: Module,
        t: float,
    ) -> None:
        """Add a tensor; ``base`` and ``inputs`` are names by which filters know the inputs."""
        self.filtered |= {name, *inputs}
        stored = []
        for source, nominal in zip(models, inputs, strict=True):
            stored.append(self.aliases[source.model][nominal])
            self.read[source.model].add(stored[-1])
        if base is not None:
            base = self.aliases[self.spec.base][base]
            self.read[self.spec.base].add(base)
        self.assignments.append(
            Assignment(
                name,
                base,
                tuple(source.model for source in models),
                tuple(stored),
                self.parameters(name, models, inputs, piece, module, t),
                tuple(source.statistics for source in models),
            )
        )

    def parameters(
        self,
        name: str,
        models: Sequence[Source],
        inputs: Sequence[str],
        piece: Slice,
        module: Module,
        t: float,
    ) -> dict[str, Any]:
        """Return the parameters of one tensor, bound: the most specific level goes first.

        Per-model ones go by the name of the model's tensor, others by that of the result's.
        """
        levels = (piece.parameters, module.parameters, self.spec.parameters)
        values: dict[str, Any] = {}
        for argument, parameter in self.method.parameters.items():
            key = parameter.kind.key
            if not parameter.kind.per_model:
                value = first_value(levels, key, name, t)
                if value is None and parameter.required:
                    raise self.no_value(key, name)
                if value is not None:
                    values[argument] = value
                continue
            found = [
                first_value((source.parameters, *levels), key, nominal, t)
                for source, nominal in zip(models, inputs, strict=True)
            ]
            if parameter.required and None in found:
                source = models[found.index(None)]
                raise self.no_value(key, name, f" of {source.model}")
            if any(value is not None for value in found):
                found = [parameter.default if value is None else value for value in found]
                values[argument] = tuple(found)
        known = (len(models), *values.items())
        if known not in self.bound:
            try:
                self.bound[known] = self.method.bind(len(models), values)
            except ValueError as error:
                raise ValueError(f"tensor {name!r}: {error}") from None
        return self.bound[known]

    def no_value(self, key: str, name: str, whose: str = "") -> ValueError:
        return ValueError(
            f"{self.method.name}: parameter {key!r}{whose} has no value for tensor {name!r}: no "
            "filter matches it; end the list with a value without a filter"
        )

    def leave_out(self, model: ModelRef, nominal: str, reason: str) -> None:
        self.why[model].setdefault(self.aliases[model][nominal], reason)

    def note_idle_filters(self) -> None:
        spec = self.spec
        levels = [spec.parameters, *(module.parameters for module in spec.modules)]
        for piece in spec.slices:
            levels += [piece.parameters, *(source.parameters for source in piece.sources)]
        filters = [
            condition.filter
            for level in levels
            for setting in level.values()
            for condition in setting.conditions
            if not any(condition.matches(name) for name in self.filtered)
        ]
        self.notes += [f"filter {text!r} matches no tensor" for text in dict.fromkeys(filters)]

    def note_bases_parameters(self) -> None:
        if self.base is None:
            return
        for piece in self.spec.slices:
            for source in piece.sources:
                if source.model == self.base and source.parameters:
                    keys = ", ".join(sorted(source.parameters))
                    note = f"the base's own parameters have no effect: {keys}"
                    if note not in self.notes:
                        self.notes.append(note)

    def account(self) -> tuple[dict[ModelRef, dict[str, str]], dict[ModelRef, list[str]]]:
        """Return what is left out of each model with the reason, and what without one."""
        left_out, leftovers = {}, {}
        for model, source in self.sources.items():
            if model not in self.read:
                continue
            rest = [name for name in source.names if name not in self.read[model]]
            reasons = {name: self.reason(model, name) for name in rest}
            if known := {name: reason for name, reason in reasons.items() if reason}:
                left_out[model] = known
            if unknown := [name for name, reason in reasons.items() if not reason]:
                leftovers[model] = unknown
        return left_out, leftovers

    def reason(self, model: ModelRef, stored: str) -> str | None:
        if stored in self.why[model]:
            return self.why[model][stored]
        rows = self.rows[model]
        if stored == rows.head and self.aliases[model].get(stored) != stored:
            return f"it is tied to {rows.embedding}"
        if not self.read[model] and model == self.spec.base:
            return f"{self.method.name} does not look at the base"
        module = names.module_of(stored, [m.name for m in self.spec.modules if m.name])
        for candidate in self.spec.modules:
            if candidate.name is not None and (candidate.name in (module, "default")):
                users = {s.model for p in candidate.slices for s in self.participants(p)}
                if model not in users:
                    return f"module {candidate.name} takes nothing from this model"
        return None


def _first_of(missing: Sequence[str]) -> str:
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    return f"{missing[0]!r}{more}"


def check_same_storage(
    one: ModelRef, ones: Collection[str], other: ModelRef, others: Collection[str]
) -> None:
    """Explain missing tensors if one model stores its experts fused and the other does not.

    Raises:
        CheckpointError: It is so.
    """
    ways = [names.expert_storage(ones), names.expert_storage(others)]
    if None not in ways and ways[0] != ways[1]:
        raise CheckpointError(
            f"{one} stores experts {ways[0]}, {other} {ways[1]}; save one of them anew as the "
            "other is (transformers' save_pretrained with save_original_format true or false)"
        )


def _by_place(source: CheckpointSource, aliases: Aliases) -> list[str]:
    """Return ``aliases``' keys in the order in which their data lie on disk."""
    place = {name: i for i, name in enumerate(source.names)}
    return sorted(aliases, key=lambda name: place[aliases[name]])


def head_name(rows: Iterable[names.VocabularyNames]) -> str | None:
    """Return what the models' head is called; None if none stores one."""
    return next((found.head for found in rows if found.head is not None), None)


def resolve_heads(
    sources: Mapping[ModelRef, CheckpointSource],
    rows: Mapping[ModelRef, names.VocabularyNames],
) -> dict[ModelRef, dict[str, str]]:
    """Return, for each model, the tensors it stands for: from name to the name it is stored under.

    They differ for the LM head only. If all heads are tied to the embedding, none has a head of
    its own; if one has, a tied one stands for its embedding under the head's name. Configurations
    may leave it to the kind of model whether heads are tied, so a model that says nothing is tied
    if it stores no head, or one that equals the embedding while another model stores none.

    Raises:
        CheckpointError: A head is tied by its configuration but differs from the embedding.
    """
    resolved = {}
    tied = {model for model, source in sources.items() if _is_tied(source, rows[model])}
    headless = any(rows[model].head is None for model in tied)
    for model, source in sources.items():
        found = {name: name for name in source.names}
        embedding, head = rows[model].embedding, rows[model].head
        silent = embedding is not None and _says_tied(source) is None
        if head is not None and (model in tied or (silent and headless)):
            if same_values(source.operand(head), source.operand(embedding)):
                del found[head]
                tied.add(model)
            elif model in tied:
                raise CheckpointError(
                    f"{model}: config.json ties {head} to {embedding}, but the two differ; "
                    f"set {_TIE} to false there if the head is meant to be its own"
                )
        resolved[model] = found
    head = head_name(rows.values())
    if any(head in found for found in resolved.values()):
        for model, found in resolved.items():
            if head not in found and model in tied:
                found[head] = rows[model].embedding
    return resolved


def _is_tied(source: CheckpointSource, rows: names.VocabularyNames) -> bool:
    """Whether the configuration ties the head, or says nothing and there is none."""
    said = _says_tied(source)
    silent = said is None and "model_type" in source.config and rows.head is None
    return (said is True or silent) and rows.embedding is not None


def _says_tied(source: CheckpointSource) -> bool | None:
    config = source.config
    part = config.get("text_config")
    inner = part.get(_TIE) if isinstance(part, dict) else None
    return config.get(_TIE, inner)

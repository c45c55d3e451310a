"""Merging checkpoints: opens and checks what a recipe names, then writes the result as a stream."""

import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergeme_ext._version import __version__
from mergeme_ext.io import (
    AdaptedSource,
    CheckpointError,
    CheckpointSink,
    CheckpointSource,
    dtype_name,
    parse_size,
)
from mergeme_ext.io.names import vocabulary_names
from mergeme_ext.io.operands import Cut, Operand, same_values
from mergeme_ext.merging import registry
from mergeme_ext.merging.companions import write_companions
from mergeme_ext.merging.execution import (
    FLOATING,
    Execution,
    PlannedTensor,
    ProgressFactory,
    merge_all,
    of_one_dtype,
    progress_bar,
)
from mergeme_ext.merging.layout import Assignment, Layout, lay_out
from mergeme_ext.merging.ranks import Alone, Ranks
from mergeme_ext.merging.recipe import load_merge_specs
from mergeme_ext.merging.registry import MergeMethod
from mergeme_ext.merging.report import REPORT_NAME, merge_report
from mergeme_ext.merging.spec import MergeSpec, ModelRef, ModelToken, TokenRule

if TYPE_CHECKING:
    from mergeme_ext import vocabulary
    from mergeme_ext.vocabulary import Vocabulary

__all__ = [
    "Allowances",
    "MergePlan",
    "check_output",
    "merge",
    "plan_merge",
    "write_checkpoint",
]

# What the identity of an input folder is taken from.
_IDENTIFYING = (".safetensors", ".bin", ".json", ".model", ".jinja")


def check_output(out: str | Path, inputs: Iterable[str | Path]) -> None:
    """Refuse to write onto an input.

    Raises:
        ValueError: ``out`` is one of the folders ``inputs``.
    """
    for folder in inputs:
        if os.path.realpath(out) == os.path.realpath(folder):
            raise ValueError(f"{out} is one of the inputs; choose another folder")


@dataclass(frozen=True)
class Allowances:
    """What is refused unless it is asked for.

    Attributes:
        crimes: Merge models of different kinds (``model_type``).
        leftovers: Patterns, such as ``*.inv_freq``, of input tensors that may stay out.
        truncate_embeddings: Cut embeddings and heads of different sizes to the smallest.
    """

    crimes: bool = False
    leftovers: Sequence[str] = ()
    truncate_embeddings: bool = False


@dataclass(frozen=True)
class MergePlan:
    """A merge whose inputs are open, checked and known to fit; nothing is written yet.

    Attributes:
        spec: What was asked for.
        method: The method.
        sources: The open inputs.
        labels: What to call each of them in messages and in the report.
        layout: Which input tensors make which output tensor.
        tensors: The result's tensors, in the order in which they are written.
        config: The result's ``config.json``; empty if the lead has none.
        vocabulary: The result's, if the recipe asks for one.
        dropped: For each input, the tensors that stay out, with the reason.
        statistics: Folders of statistics that the method is given.
    """

    spec: MergeSpec
    method: MergeMethod
    sources: Mapping[ModelRef, CheckpointSource]
    labels: Mapping[ModelRef, str]
    layout: Layout
    tensors: Sequence[PlannedTensor]
    config: Mapping[str, Any]
    vocabulary: "Vocabulary | None"
    dropped: Mapping[ModelRef, Mapping[str, str]]
    statistics: Sequence[Path] = ()

    @property
    def lead(self) -> CheckpointSource:
        """The base, or the first model: gives configuration and companion files."""
        return self.sources[self.spec.lead]

    @property
    def total_bytes(self) -> int:
        """Bytes of tensor data in the result."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def read_bytes(self) -> int:
        """Bytes in files of all inputs of all tensors."""
        return sum(
            self.sources[ref].bytes_to_read(name)
            for tensor, assignment in zip(self.tensors, self.layout.assignments, strict=True)
            for ref, name in _read_by(self, tensor, assignment)
        )

    @property
    def operand_bytes(self) -> int:
        """Bytes of the same in the dtypes that are merged: FP8 and adapted weights are computed."""
        return sum(
            operand.dtype.itemsize * torch.Size(operand.shape).numel()
            for tensor in self.tensors
            for operand in tensor.operands
        )

    def run(
        self,
        out: str | Path,
        *,
        execution: Execution | None = None,
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
        resume: bool = False,
        progress: ProgressFactory | None = None,
        ranks: Alone | Ranks | None = None,
        check: Callable[[], None] | None = None,
        model_card: bool = True,
        copy_tokenizer: bool = True,
    ) -> None:
        """Write the result; see ``merge``.

        Args:
            out: Target folder.
            execution: Threads, memory, device.
            max_shard_size: Bytes of data in one file.
            overwrite: Replace an existing checkpoint folder.
            resume: Go on with what an interrupted run left.
            progress: Makes a display.
            ranks: The processes that share the work; this one alone if None.
            check: Called when everything is in place but not yet published; raises if it must not
                be.
            model_card: Write ``README.md``.
            copy_tokenizer: Copy the lead's tokenizer, or write the merged one.
        """
        inputs = [folder for ref in self.sources for folder in (ref.path, ref.adapter) if folder]
        check_output(out, [*inputs, *self.statistics])

        def finish(sink: CheckpointSink) -> None:
            write_companions(self, sink, with_card=model_card, copy_tokenizer=copy_tokenizer)
            report = merge_report(self, sink.notes)
            sink.write_text(REPORT_NAME, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
            if check is not None:
                check()

        write_checkpoint(
            out,
            self.tensors,
            self.method,
            execution or Execution(),
            fingerprint=self.fingerprint(),
            finish=finish,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            resume=resume,
            progress=progress,
            ranks=ranks or Alone(),
        )

    def fingerprint(self) -> str:
        """Return a text that changes whenever the result's bytes would."""
        places = {ref: number for number, ref in enumerate(self.sources)}
        facts = {
            "version": __version__,
            "method": self.method.name,
            "inputs": [_identity(ref.path, ref.adapter) for ref in self.sources],
            "statistics": [_identity(folder) for folder in self.statistics],
            "config": self.config,
            "tensors": [
                [
                    t.name,
                    t.tensor_name,
                    dtype_name(t.dtype),
                    t.shape,
                    t.parameters,
                    [[places[r] for r in a.models], a.names, a.base],
                ]
                for t, a in zip(self.tensors, self.layout.assignments, strict=True)
            ],
            "vocabulary": None if self.vocabulary is None else self.vocabulary.fingerprint(),
        }
        text = json.dumps(facts, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _identity(*folders: Path | None) -> list[Any]:
    """Return names, sizes and times of the files that an input consists of."""
    files = []
    for folder in folders:
        if folder is not None:
            with os.scandir(folder) as entries:
                kept = [e for e in entries if e.name.endswith(_IDENTIFYING) and e.is_file()]
            states = sorted((e.name, e.stat()) for e in kept)
            files.append([[name, s.st_size, s.st_mtime_ns] for name, s in states])
    return files


def _read_by(
    plan: MergePlan, tensor: PlannedTensor, assignment: Assignment
) -> Iterator[tuple[ModelRef, str]]:
    """Yield what is read for a tensor: the model, and the tensor's name there."""
    if tensor.base is not None:
        yield plan.spec.base, assignment.base
    pairs = list(zip(assignment.models, assignment.names, strict=True))
    yield from pairs if tensor.parameters is not None else pairs[:1]


def write_checkpoint(
    out: str | Path,
    tensors: Sequence[PlannedTensor],
    method: MergeMethod,
    execution: Execution,
    *,
    finish: Callable[[CheckpointSink], None],
    fingerprint: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    resume: bool = False,
    progress: ProgressFactory | None = None,
    ranks: Alone | Ranks | None = None,
) -> None:
    """Write ``tensors``, merged by ``method``, to the folder ``out``, then publish it.

    Args:
        out: Target folder.
        tensors: In the order in which they fill the shards.
        method: Merges those that have parameters.
        execution: Threads, memory, device.
        finish: Writes the other files; called when all tensors are in place.
        fingerprint: See ``CheckpointSink``.
        max_shard_size: Likewise.
        overwrite: Likewise.
        resume: Likewise.
        progress: Makes a display of the bytes to come.
        ranks: The processes that share the work.
    """
    ranks = ranks or Alone()
    ranks.begin()
    if fingerprint is not None:
        fingerprint = f"{fingerprint}-{parse_size(max_shard_size)}"
    sink = CheckpointSink(
        out,
        tensors,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        fingerprint=fingerprint,
        resume=resume or ranks.restarted,
        rank=ranks.rank,
        threads=execution.num_threads(),
    )
    if ranks.rank > 0:
        ranks.wait("begun", 1)
        with sink, progress_bar(None, 0) as bar:
            merge_all(method, tensors, sink, execution, ranks=ranks, bar=bar)
        ranks.arrive("done")
        ranks.wait("published", 1)
        return
    with sink:
        ranks.arrive("begun")
        with progress_bar(progress, sink.total_bytes) as bar:
            merge_all(method, tensors, sink, execution, ranks=ranks, bar=bar)
            ranks.wait("done", ranks.size - 1)
        sink.collect()
        finish(sink)
    ranks.arrive("published")


def merge(
    recipe: str | Path | MergeSpec,
    out: str | Path,
    *,
    execution: Execution | None = None,
    allow: Allowances | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    resume: bool = False,
    progress: ProgressFactory | None = None,
) -> MergePlan:
    """Merge checkpoints as ``recipe`` says and write the result to the folder ``out``.

    Everything is checked before anything is written; ``out`` appears only when complete.

    Args:
        recipe: A YAML file's path, or a ``MergeSpec``. Of a file with several documents, all are
            carried out; those with a name go into folders beside ``out`` that are removed at the
            end.
        out: Target folder.
        execution: Threads, memory, chunk, device; none of it changes a bit.
        allow: What is refused unless it is asked for.
        max_shard_size: Bytes of data in one file, as a number or as ``5GB``.
        overwrite: Replace an existing checkpoint folder.
        resume: Go on with what an interrupted merge of the same inputs left.
        progress: Called with the number of bytes to come; returns an object with ``update(n)``
            and ``close()``, such as a tqdm bar.

    Returns:
        The plan that was carried out (of the last document).

    Raises:
        RecipeError: The recipe asks for something unknown, misplaced or out of range.
        CheckpointError: A checkpoint is damaged or does not fit the others, or a number in it is
            not finite.
        TypeError: A ``MergeSpec`` names an unknown parameter, or lacks one.
        ValueError: A parameter of it is out of range, or the target is one of the inputs.
        OSError: The target exists, or the disk has no room.
    """
    specs = [recipe] if isinstance(recipe, MergeSpec) else load_merge_specs(recipe)
    options = {
        "execution": execution,
        "max_shard_size": max_shard_size,
        "resume": resume,
        "progress": progress,
    }
    for plan, target in plan_documents(specs, out, allow=allow):
        plan.run(target, overwrite=overwrite, **options)
    return plan


def plan_merge(spec: MergeSpec, *, allow: Allowances | None = None) -> MergePlan:
    """Open and check everything that ``spec`` names, and return what will be written.

    Raises:
        CheckpointError, TypeError, ValueError: As for ``merge``.
    """
    return _Planner(spec, allow or Allowances()).plan()


class _Planner:
    """The steps of ``plan_merge``."""

    def __init__(self, spec: MergeSpec, allow: Allowances):
        self.spec, self.allow = spec, allow
        self.method = registry.get(spec.method)
        self.sources = {ref: open_model(ref) for ref in spec.references}
        self.labels = {ref: str(ref) for ref in self.sources}
        self.rows = {ref: vocabulary_names(source.names) for ref, source in self.sources.items()}
        self.statistics: dict[Path, CheckpointSource] = {}
        self._matched: set[Path] = set()  # of them, those that hold something for these models

    def plan(self) -> MergePlan:
        layout = lay_out(self.spec, self.sources, allow_crimes=self.allow.crimes)
        dropped = self._account(layout)
        self.vocabulary = self._plan_vocabulary()
        self._tried: set[str] = set()
        tensors = [self._plan_tensor(assignment) for assignment in layout.assignments]
        for folder, source in self.statistics.items():
            if folder not in self._matched:
                raise CheckpointError(
                    f"{folder}: holds no statistics of these models' tensors; its first is "
                    f"{source.names[0] if source.names else 'none'}"
                )
        config = self._config(layout, tensors)
        return MergePlan(
            spec=self.spec,
            method=self.method,
            sources=self.sources,
            labels=self.labels,
            layout=layout,
            tensors=tensors,
            config=config,
            vocabulary=self.vocabulary,
            dropped=dropped,
            statistics=tuple(self.statistics),
        )

    def _account(self, layout: Layout) -> dict[ModelRef, dict[str, str]]:
        """Return why each unused input tensor stays out; refuse if there is no reason."""
        dropped: dict[ModelRef, dict[str, str]] = {}
        for ref, source in self.sources.items():
            reasons = {**source.dropped, **layout.left_out.get(ref, {})}
            leftovers = layout.leftovers.get(ref, ())
            refused = [name for name in leftovers if not self._may_stay_out(name)]
            if refused:
                more = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
                raise CheckpointError(
                    f"{self.labels[ref]}: tensor {refused[0]!r}{more} would not get into the "
                    "result; allow it to stay out by name if that is what you want"
                )
            reasons |= dict.fromkeys(leftovers, "allowed to stay out")
            if ref == self.spec.base and ref not in self.spec.models and not self.method.takes_base:
                why = f"{self.method.name} does not look at the base"
                reasons |= dict.fromkeys(source.names, why)
            dropped[ref] = reasons
        return dropped

    def _may_stay_out(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.allow.leftovers)

    def _plan_vocabulary(self) -> "Vocabulary | None":
        wanted = self.spec.tokenizer
        if wanted is None:
            return None
        from mergeme_ext.vocabulary import VocabularyInput, plan_vocabulary

        refs = list(self.sources)
        inputs = [
            VocabularyInput(
                label=self.labels[ref],
                folder=source.tokenizer_folder,
                rows=0 if self.rows[ref].embedding is None else self._embedding_rows(ref),
                config=source.config,
            )
            for ref, source in self.sources.items()
        ]
        base = None if self.spec.base is None else refs.index(self.spec.base)
        source = wanted.source
        return plan_vocabulary(
            inputs,
            base,
            source=self._number(source) if isinstance(source, ModelRef) else source,
            tokens={token: self._token_rule(rule) for token, rule in wanted.tokens.items()},
            pad_to_multiple_of=wanted.pad_to_multiple_of,
        )

    def _embedding_rows(self, ref: ModelRef) -> int:
        return self.sources[ref].info(self.rows[ref].embedding).shape[0]

    def _number(self, model: ModelRef) -> int:
        """Return the place of ``model`` among the sources, with or without its adapter."""
        refs = list(self.sources)
        if model in refs:
            return refs.index(model)
        folder = os.path.realpath(model.path)
        return next(i for i, ref in enumerate(refs) if os.path.realpath(ref.path) == folder)

    def _token_rule(self, rule: TokenRule) -> "vocabulary.TokenRule":
        from mergeme_ext import vocabulary

        source: Any = rule.source
        if isinstance(source, ModelRef):
            source = self._number(source)
        elif isinstance(source, ModelToken):
            number = self._number(source.model)
            source = vocabulary.TokenOf(number, source.token, source.token_id)
        return vocabulary.TokenRule(source, rule.force)

    def _plan_tensor(self, assignment: Assignment) -> PlannedTensor:
        method = self.method
        refs = list(assignment.models)
        names = list(assignment.names)
        use_base = method.takes_base and assignment.base is not None
        if use_base:
            refs, names = [self.spec.base, *refs], [assignment.base, *names]
        operands = [self.sources[r].operand(n) for r, n in zip(refs, names, strict=True)]
        lead = operands[0]
        if lead.dtype not in FLOATING:
            self._check_equal(assignment.name, refs, operands)
            return self._planned(assignment, refs, [lead], lead.dtype, None, base=None)
        others = [o.dtype for o in operands if o.dtype not in FLOATING]
        if others:
            raise CheckpointError(
                f"tensor {assignment.name!r} is {dtype_name(lead.dtype)} in {self.labels[refs[0]]} "
                f"but {dtype_name(others[0])} in another model"
            )
        operands = self._fit(assignment.name, refs, operands)
        least = torch.float64 if self.spec.dtype == torch.float64 else None
        operands = of_one_dtype(operands, least)
        home = (refs[0], names[0])
        if assignment.base is not None:  # also if the method looks at the models only
            home = (self.spec.base, assignment.base)
        dtype = self.spec.result_dtype or self.sources[home[0]].default_dtype(home[1])
        parameters = self._try(assignment, len(assignment.models))
        base = operands.pop(0) if use_base else None
        return self._planned(assignment, refs, operands, dtype, parameters, base=base)

    def _planned(
        self,
        assignment: Assignment,
        refs: Sequence[ModelRef],
        models: Sequence[Operand],
        dtype: torch.dtype,
        parameters: dict[str, Any] | None,
        *,
        base: Operand | None,
    ) -> PlannedTensor:
        statistics = None
        if self.method.statistics is not None:
            pairs = zip(assignment.statistics, assignment.names, strict=True)
            statistics = [self._statistic(folder, name) for folder, name in pairs]
        return PlannedTensor(
            name=assignment.name,
            tensor_name=assignment.base or assignment.names[0],
            dtype=dtype,
            shape=tuple(models[0].shape),
            base=base,
            models=tuple(models),
            labels=tuple(self.labels[ref] for ref in refs),
            parameters=parameters,
            statistics=statistics,
        )

    def _statistic(self, folder: Path | None, name: str) -> Operand | None:
        if folder is None:
            raise CheckpointError(
                f"{self.method.name} needs {self.method.statistics} of each model: a folder of "
                "statistics, among the model's parameters"
            )
        if folder not in self.statistics:
            self.statistics[folder] = CheckpointSource(folder)
        source = self.statistics[folder]
        if name not in source:
            return None
        self._matched.add(folder)
        return source.operand(name)

    def _try(self, assignment: Assignment, num_models: int) -> dict[str, Any]:
        """Return the bound parameters, after a small trial of each new combination of them.

        Some mistakes only show when all parameters come together.
        """
        key = repr((num_models, assignment.parameters))
        if key not in self._tried and self.method.survey is None:
            self._tried.add(key)
            ramps = [torch.linspace(1, 2, 6).view(2, 3) * (1 + m) for m in range(num_models)]
            self.method.prepare(torch.zeros(2, 3), ramps, assignment.parameters)
        return assignment.parameters

    def _check_equal(
        self, name: str, refs: Sequence[ModelRef], operands: Sequence[Operand]
    ) -> None:
        """Refuse integers and the like that differ: no method can merge them."""
        for ref, operand in zip(refs[1:], operands[1:], strict=True):
            if not same_values(operands[0], operand):
                raise CheckpointError(
                    f"tensor {name!r} ({dtype_name(operands[0].dtype)}, so it cannot be merged) "
                    f"differs between {self.labels[refs[0]]} and {self.labels[ref]}"
                )

    def _fit(
        self, name: str, refs: Sequence[ModelRef], operands: Sequence[Operand]
    ) -> list[Operand]:
        """Return ``operands`` of one shape, or say which does not fit."""
        vocabulary_sized = any(name in rows.every for rows in self.rows.values())
        if self.vocabulary is not None and vocabulary_sized:
            order = list(self.sources)
            everyone = self._all_operands(name, refs, operands)
            return [self.vocabulary.operand(order.index(ref), everyone) for ref in refs]
        shapes = [tuple(o.shape) for o in operands]
        if len(set(shapes)) == 1:
            return list(operands)
        if (
            vocabulary_sized
            and self.allow.truncate_embeddings
            and len({len(s) for s in shapes}) == 1
        ):
            smallest = tuple(min(sizes) for sizes in zip(*shapes, strict=True))
            return [o if tuple(o.shape) == smallest else Cut(o, smallest) for o in operands]
        other = next(i for i, s in enumerate(shapes) if s != shapes[0])
        hint = ""
        if vocabulary_sized and shapes[0][1:] == shapes[other][1:]:
            hint = (
                "; give the recipe a tokenizer (source: union or base) to merge different "
                "vocabularies"
            )
        raise CheckpointError(
            f"tensor {name!r} is {list(shapes[0])} in {self.labels[refs[0]]} but "
            f"{list(shapes[other])} in {self.labels[refs[other]]}{hint}"
        )

    def _all_operands(
        self, name: str, refs: Sequence[ModelRef], operands: Sequence[Operand]
    ) -> list[Operand]:
        """Return every source's embedding or head: a token may be filled in from any of them."""
        known = dict(zip(refs, operands, strict=True))
        out = []
        for ref, source in self.sources.items():
            own = name if name in source else self.rows[ref].embedding  # a tied head
            out.append(known.get(ref) or source.operand(own))
        return out

    def _config(self, layout: Layout, tensors: Sequence[PlannedTensor]) -> dict[str, Any]:
        config = dict(layout.config)
        if not config:
            return config
        if self.vocabulary is not None:
            config = self.vocabulary.config_changes(config)
        embedding = self.rows[self.spec.lead].embedding
        rows = [t.shape[0] for t in tensors if t.name == embedding]
        for part in (config, config.get("text_config")):
            if rows and isinstance(part, dict) and "vocab_size" in part:
                part["vocab_size"] = rows[0]
        return config


def open_model(ref: ModelRef) -> CheckpointSource:
    """Return the checkpoint that ``ref`` means, opened, with its adapter applied.

    Raises:
        CheckpointError: It is damaged, or the adapter does not fit it.
    """
    source = CheckpointSource(ref.path)
    if ref.adapter is None:
        return source
    return AdaptedSource(source, ref.adapter)


def plan_documents(
    specs: Sequence[MergeSpec], out: str | Path, *, allow: Allowances | None = None
) -> Iterator[tuple[MergePlan, Path]]:
    """Yield plan and target of each document of a recipe; carry one out before taking the next.

    All but the last go into a hidden folder beside ``out``, which is removed at the end, or stays
    for a resumed run if that does not come. A document that is complete there is not yielded.
    """
    out = Path(out)
    if len(specs) == 1:
        yield plan_merge(specs[0], allow=allow), out
        return
    work = out.with_name(f".{out.name}.documents")
    made: dict[str, Path] = {}
    for spec in specs[:-1]:
        target = work / spec.name
        plan = plan_merge(spec.with_documents(made), allow=allow)
        done, mark = plan.fingerprint(), work / f"{spec.name}.done"
        if not (target.is_dir() and mark.is_file() and mark.read_text() == done):
            shutil.rmtree(target, ignore_errors=True)
            yield plan, target
            mark.write_text(done)
        made[spec.name] = target
    yield plan_merge(specs[-1].with_documents(made), allow=allow), out
    shutil.rmtree(work, ignore_errors=True)

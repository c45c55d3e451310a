"""The vocabulary of a result: its tokenizer, its rows, and the ids in its configuration."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mergeme_ext.io import CheckpointSink
from mergeme_ext.io.companions import TEMPLATE_FILES, TOKENIZER_FILES
from mergeme_ext.io.format import load_json_object
from mergeme_ext.io.operands import Operand, num_rows
from mergeme_ext.vocabulary.rows import VocabularyRows
from mergeme_ext.vocabulary.tokenizer import (
    ADDED,
    CONFIG,
    DOCUMENT,
    FLAGS,
    ModelTokenizer,
    VocabularyError,
)

__all__ = ["RowPlan", "Vocabulary", "VocabularyInput"]

# Those that stay true, or are rewritten, when tokens are added.
_EXTENSIBLE = (DOCUMENT, CONFIG, "special_tokens_map.json", ADDED)
_GENERATION = "generation_config.json"
_ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class VocabularyInput:
    """A model that takes part.

    Attributes:
        label: What to call it.
        folder: Where its tokenizer lies.
        rows: How many rows its embedding has.
        config: Its ``config.json``.
    """

    label: str
    folder: Path
    rows: int
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class RowPlan:
    """Where one model's rows in the result's vocabulary come from.

    Attributes:
        model: int32 ``[size]``: number of the model, or ``rows.ZERO`` or ``rows.AVERAGE``.
        index: int64 ``[size]``: row there.
        own: int64 ``[size]``: this model's own row for the token, or -1.
        unchanged: Whether this is the model's own matrix.
    """

    model: Tensor
    index: Tensor
    own: Tensor
    unchanged: bool


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What ``plan_vocabulary`` decided.

    Attributes:
        size: Rows of the result's embedding.
        ids: From every token of the result to its id.
        notes: What was done, in sentences, for the user.
        inputs: The models, in order.
        tokenizers: Theirs.
        lead: Number of the model whose configuration the result gets.
        kept: Number of the model whose tokenizer the result gets, or extends.
        document: The extended ``tokenizer.json``; None if the kept one stays as it is.
        plans: For each model.
    """

    size: int
    ids: Mapping[str, int] = field(repr=False)
    notes: Sequence[str]
    inputs: Sequence[VocabularyInput]
    tokenizers: Sequence[ModelTokenizer] = field(repr=False)
    lead: int
    kept: int
    document: Mapping[str, Any] | None = field(repr=False)
    plans: Sequence[RowPlan] = field(repr=False)

    @property
    def tokens(self) -> int:
        """How many tokens the result has."""
        return len(self.ids)

    def needs_change(self, model_index: int) -> bool:
        """Whether a model's rows are not yet what they should be."""
        return not self.plans[model_index].unchanged

    def operand(self, model_index: int, operands: Sequence[Operand]) -> Operand:
        """Return one model's embedding, head or bias in this vocabulary, ``[size, ...]``.

        Args:
            model_index: The model.
            operands: The same tensor of every model; tokens the one lacks are filled in from them.

        Raises:
            VocabularyError: An operand does not have the planned rows, or one that fills in tokens
                has rows of another shape.
        """
        if len(operands) != len(self.inputs):
            raise VocabularyError(
                f"expected a tensor of each of {len(self.inputs)} models, got {len(operands)}"
            )
        plan = self.plans[model_index]
        ours = operands[model_index]
        wanted = self.inputs[model_index]
        if num_rows(ours) != wanted.rows:
            raise VocabularyError(
                f"{wanted.label}: expected {wanted.rows} rows, one for each of its embedding, "
                f"got {num_rows(ours)}"
            )
        if plan.unchanged:
            return ours
        out = VocabularyRows(plan.model, plan.index, [p.own for p in self.plans], operands)
        for m in out.models:
            label, rows = self.inputs[m].label, self.inputs[m].rows
            if num_rows(operands[m]) != rows:
                raise VocabularyError(f"{label}: expected {rows} rows, got {num_rows(operands[m])}")
            if tuple(operands[m].shape[1:]) != tuple(ours.shape[1:]):
                raise VocabularyError(
                    f"{label} cannot give {wanted.label} the tokens it lacks: their rows are "
                    f"{list(operands[m].shape[1:])} and {list(ours.shape[1:])}"
                )
        return out

    def fingerprint(self) -> str:
        """Return a text that is another one if any row or token is."""
        digest = hashlib.sha256(json.dumps([self.size, sorted(self.ids.items())]).encode())
        for plan in self.plans:
            for tensor in (plan.model, plan.index, plan.own):
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    # Files

    def write(self, sink: CheckpointSink, *, chat_template: bool = False) -> list[str]:
        """Write the tokenizer's files; return the names of those that are taken care of.

        A tokenizer that stays as it is is copied byte for byte. The lead's file of a returned name
        must not be copied.

        Args:
            sink: An open sink.
            chat_template: Copy the chat template too, if it lies in a file of its own.
        """
        folder = self.tokenizers[self.kept].folder
        names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
        texts = {} if self.document is None else self._extended_files(folder)
        for name in names:
            if self.document is None or (name in _EXTENSIBLE and name not in texts):
                sink.copy_file(folder / name, name)
        for name, text in texts.items():
            sink.write_text(name, text)
        done = [*TOKENIZER_FILES]
        if chat_template:
            for name in TEMPLATE_FILES:
                if (folder / name).is_file():
                    sink.copy_file(folder / name, name)
            done += TEMPLATE_FILES
        return done

    def _extended_files(self, folder: Path) -> dict[str, str]:
        texts = {DOCUMENT: _json(self.document)}
        added = self.document["added_tokens"]
        config = _load(folder / CONFIG) or {"tokenizer_class": "PreTrainedTokenizerFast"}
        if "added_tokens_decoder" in config:
            decoder = config["added_tokens_decoder"]
            for entry in added:
                flags = {"content": entry["content"], **{flag: entry[flag] for flag in FLAGS}}
                decoder.setdefault(str(entry["id"]), flags)
        texts[CONFIG] = _json(config)
        old = _load(folder / ADDED)
        if old is not None:
            kept = self.tokenizers[self.kept]
            fresh = {e["content"]: e["id"] for e in added if e["content"] not in kept.ids}
            texts[ADDED] = _json({**old, **fresh})
        return texts

    # Configuration

    def config_changes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the lead's configuration with what the vocabulary changes in it.

        ``vocab_size`` becomes the number of rows, where it is there. If the result has another
        model's tokenizer, ids of special tokens are those in its configuration, or else in its
        tokenizer's; ids that it does not speak of follow their tokens, and become null where the
        token is gone.

        Args:
            config: ``config.json`` or ``generation_config.json`` of the lead.
        """
        out = json.loads(json.dumps(config))
        if self.kept != self.lead:
            self._change_ids(out, self._ids_of_kept(is_model="model_type" in config))
        for part in (out, out.get("text_config")):
            if isinstance(part, dict) and "vocab_size" in part:
                part["vocab_size"] = self.size
        return out

    def _ids_of_kept(self, *, is_model: bool) -> dict[str, Any]:
        kept, tokenizer = self.inputs[self.kept], self.tokenizers[self.kept]
        named = _load(tokenizer.folder / CONFIG) or {}
        own: dict[str, Any] = {}
        for key in _ROLES:
            token = named.get(key.removesuffix("_id"))
            own[key] = tokenizer.ids.get(token["content"] if isinstance(token, dict) else token)
        own |= {k: v for k, v in kept.config.items() if _is_id(k) and v is not None}
        if not is_model:
            generation = _load(Path(kept.folder) / _GENERATION) or {}
            own |= {k: v for k, v in generation.items() if _is_id(k)}
        return {key: value for key, value in own.items() if value is not None}

    def _change_ids(self, out: dict[str, Any], theirs: Mapping[str, Any]) -> None:
        tokens = {number: token for token, number in self.tokenizers[self.lead].ids.items()}
        for part in (out, out.get("text_config")):
            if not isinstance(part, dict):
                continue
            for key in [key for key in part if _is_id(key)]:
                part[key] = theirs.get(key, self._moved(part[key], tokens))
        for key in _ROLES:
            if key in theirs:
                out[key] = theirs[key]

    def _moved(self, value: Any, tokens: Mapping[int, str]) -> Any:
        if isinstance(value, list):
            moved = [self._moved(item, tokens) for item in value]
            return [item for item in moved if item is not None] or None
        if isinstance(value, int) and not isinstance(value, bool):
            return self.ids.get(tokens.get(value, ""))
        return value


def _is_id(key: str) -> bool:
    return key.endswith(("_token_id", "_token_ids")) or key in (
        "suppress_tokens",
        "begin_suppress_tokens",
    )


def _load(path: Path) -> dict[str, Any] | None:
    return load_json_object(path.read_bytes(), path.name) if path.is_file() else None


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"

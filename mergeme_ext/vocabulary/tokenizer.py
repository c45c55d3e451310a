"""Reads a model folder's tokenizer: its tokens, their ids, and the document that defines them."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mergeme_ext.io.format import CheckpointError, load_json_object

__all__ = ["FLAGS", "ModelTokenizer", "VocabularyError", "load_document", "read_tokenizer"]

DOCUMENT = "tokenizer.json"
CONFIG = "tokenizer_config.json"
ADDED = "added_tokens.json"
# What transformers can make a tokenizer.json from.
CONVERTIBLE = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
# How an added token is found in a text, and what it is when nothing is said.
FLAGS = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": False,
}
_INSTALL = "pip install 'mergeme_ext[hf]'"


class VocabularyError(CheckpointError):
    """Tokenizers that cannot be read, or not be made into one."""


@dataclass(frozen=True, eq=False)
class ModelTokenizer:
    """A model's tokenizer.

    Attributes:
        label: What to call the model.
        folder: Where it lies.
        document: ``tokenizer.json``, parsed, or what it would be.
        ids: From every token, added ones included, to its id.
        added: From tokens that are found in a text before it is split, to how they are found.
    """

    label: str
    folder: Path
    document: Mapping[str, Any] = field(repr=False)
    ids: Mapping[str, int] = field(repr=False)
    added: Mapping[str, Mapping[str, bool]] = field(repr=False)

    @property
    def kind(self) -> str:
        """The algorithm that splits words: ``BPE``, ``Unigram``, ``WordPiece``, ``WordLevel``."""
        return self.document["model"]["type"]

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether its tokens spell bytes by the letters that GPT-2 has for them."""
        parts = (self.document.get("pre_tokenizer"), self.document.get("decoder"))
        return any(part["type"] == "ByteLevel" for part in _components(parts))

    @cached_property
    def end(self) -> int:
        """One more than the highest id."""
        return max(self.ids.values(), default=-1) + 1

    def by_id(self) -> list[str]:
        """Return all tokens in the order of their ids."""
        return sorted(self.ids, key=self.ids.__getitem__)


def _components(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield what has a type within a pre-tokenizer or decoder, sequences unpacked."""
    if isinstance(value, Mapping):
        if "type" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _components(item)


def load_document(document: Mapping[str, Any] | bytes, label: str) -> Any:
    """Return the ``tokenizers.Tokenizer`` that ``document``, parsed or not, defines.

    Raises:
        VocabularyError: The library is missing, or refuses the document.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise VocabularyError(
            f"merging vocabularies needs the tokenizers library: {_INSTALL}"
        ) from None
    try:
        if isinstance(document, bytes):
            return Tokenizer.from_str(document.decode("utf-8"))
        return Tokenizer.from_str(json.dumps(document, ensure_ascii=False))
    except Exception as error:  # the library raises bare Exceptions
        raise VocabularyError(f"{label}: {DOCUMENT} cannot be used: {error}") from None


def read_tokenizer(
    folder: str | Path, label: str, cache: dict[str, ModelTokenizer] | None = None
) -> ModelTokenizer:
    """Return the tokenizer in a model's ``folder``.

    Tokens that only ``tokenizer_config.json`` or ``added_tokens.json`` tell of are there too, as
    they are for transformers.

    Args:
        folder: With ``tokenizer.json``, or with older files, which transformers then converts.
        label: What to call the model in messages.
        cache: Filled with tokenizers by their contents; equal files are read once.

    Raises:
        VocabularyError: There is no tokenizer, or it cannot be read.
    """
    folder = Path(folder)
    texts = [_read(folder / name) for name in (DOCUMENT, CONFIG, ADDED)]
    if texts[0] is None:
        texts[0] = _convert(folder, label)
    digest = hashlib.sha256()
    for text in texts:
        digest.update(b"-" if text is None else hashlib.sha256(text).digest())
    key = digest.hexdigest()
    if cache is not None and key in cache:
        return replace(cache[key], label=label, folder=folder)
    document = load_json_object(texts[0], f"{label}: {DOCUMENT}")
    late = _late_tokens(texts[1], texts[2], label)
    tokenizer = load_document(texts[0], label)
    if "model" not in document or "type" not in document["model"]:
        # Files from before the type was written down.
        document = json.loads(tokenizer.to_str())
    known = tokenizer.get_vocab(with_added_tokens=True)
    if missing := [entry for entry in late if entry["content"] not in known]:
        document["added_tokens"] = [*document.get("added_tokens", ()), *missing]
        tokenizer = load_document(document, label)
        known = tokenizer.get_vocab(with_added_tokens=True)
    added = {
        entry["content"]: {flag: bool(entry.get(flag, FLAGS[flag])) for flag in FLAGS}
        for entry in document.get("added_tokens") or ()
    }
    out = ModelTokenizer(label, folder, document, known, added)
    if cache is not None:
        cache[key] = out
    return out


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _late_tokens(config: bytes | None, added: bytes | None, label: str) -> list[dict[str, Any]]:
    """Return the added tokens that stand in the smaller files, in the order of their ids."""
    out: dict[str, dict[str, Any]] = {}
    if added is not None:
        for token, number in load_json_object(added, f"{label}: {ADDED}").items():
            out[token] = {"id": int(number), "content": token, **FLAGS}
    if config is not None:
        decoder = load_json_object(config, f"{label}: {CONFIG}").get("added_tokens_decoder") or {}
        for number, entry in decoder.items():
            if isinstance(entry, Mapping) and isinstance(entry.get("content"), str):
                flags = {flag: bool(entry.get(flag, FLAGS[flag])) for flag in FLAGS}
                out[entry["content"]] = {
                    "id": int(number),
                    "content": entry["content"],
                    **flags,
                }
    return sorted(out.values(), key=lambda entry: entry["id"])


def _convert(folder: Path, label: str) -> bytes:
    """Return what ``tokenizer.json`` would be for a folder with older files only."""
    found = [name for name in CONVERTIBLE if (folder / name).is_file()]
    if not found:
        raise VocabularyError(f"{label}: {folder} has no tokenizer ({DOCUMENT})")
    what = f"{label}: {folder} has {found[0]} but no {DOCUMENT}"
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise VocabularyError(f"{what}; converting it needs transformers: {_INSTALL}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return tokenizer.backend_tokenizer.to_str().encode()
    except Exception as error:  # whatever a foreign file provokes
        reason = str(error).strip().split("\n")[0]
        raise VocabularyError(
            f"{what}, and transformers cannot convert it ({reason}); it may need sentencepiece and "
            f"protobuf beside it: {_INSTALL} sentencepiece protobuf"
        ) from None

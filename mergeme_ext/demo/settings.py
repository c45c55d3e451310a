"""What the demo can be told, and which models it makes."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "DOMAINS",
    "EXPERT_DOMAINS",
    "METHODS",
    "ROUTERS",
    "DemoSettings",
    "default_cache",
    "key",
]

EXPERT_DOMAINS = ("medicine", "code")
DOMAINS = (*EXPERT_DOMAINS, "dialogue")

# Label -> name and parameters of the merge method; MergeME's setting for TIES and DARE.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "mean": ("linear", {}),
    "TIES": ("ties", {"density": 0.8, "lambda": "1/n", "normalize": False}),
    "DARE": ("dare_linear", {"density": 0.8, "lambda": "1/n", "rescale": "inverse_prob"}),
}
# Label -> how the router starts.
ROUTERS: dict[str, dict[str, Any]] = {
    "hidden": {"gate_mode": "hidden", "gate_scale": 8.0, "prompt_tokens": 128},
    "random": {"gate_mode": "random"},
}
ROUTER_PROMPTS = 16
EXPERTS_PER_TOKEN = 2


def default_cache() -> Path:
    """Return the folder for what is kept: $MERGEME_CACHE, or one in the user's cache."""
    if folder := os.environ.get("MERGEME_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mergeme_ext"


@dataclass(frozen=True)
class DemoSettings:
    """What the demo can be told.

    Attributes:
        out: Folder for the table, the plot, the samples and the recipes.
        cache: Folder for packages, texts, experts, models and evaluations.
        base: Checkpoint to start from, instead of the package's.
        texts: Domain to a file with its text, instead of the packages'.
        steps: Of fine-tuning each expert.
        rows: Held-out rows of 256 tokens in each domain.
        fresh: Make everything anew but the base and the texts.
    """

    out: Path
    cache: Path
    base: Path | None = None
    texts: Mapping[str, Path] = field(default_factory=dict)
    steps: int = 24
    rows: int = 6
    fresh: bool = False

    def __post_init__(self) -> None:
        for domain in self.texts:
            if domain not in DOMAINS:
                raise ValueError(f"expected a domain of {', '.join(DOMAINS)}, got {domain!r}")
        for name in ("steps", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")


def key(*parts: Any) -> str:
    """Return a short digest of ``parts``, anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]

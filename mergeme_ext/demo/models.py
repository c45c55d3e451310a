"""The models that the demo compares, and how each is made."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mergeme_ext._version import __version__
from mergeme_ext.demo.settings import (
    EXPERT_DOMAINS,
    EXPERTS_PER_TOKEN,
    METHODS,
    ROUTERS,
    key,
)

__all__ = ["Made", "build", "planned_models"]


@dataclass(frozen=True)
class Made:
    """A model of the comparison.

    Attributes:
        label: Its name in the table.
        kind: "base", "expert", "dense" or "moe".
        folder: Of its checkpoint.
        key: Changes whenever its weights may.
        method: Label of the merge method, for "dense" and "moe".
        router: Label of the router's start, for "moe".
        recipe: What it is made by, for "dense" and "moe".
        domain: For "expert".
    """

    label: str
    kind: str
    folder: Path
    key: str
    method: str | None = None
    router: str | None = None
    recipe: Mapping[str, Any] | None = None
    domain: str | None = None


def planned_models(
    base: Made, experts: Mapping[str, Made], prompts: Mapping[str, Path], cache: Path
) -> list[Made]:
    """Return every dense merge and every MoE of ``experts``; nothing is made yet.

    Args:
        base: What the experts were tuned from.
        experts: Domain to expert.
        prompts: Domain to a .jsonl file of texts that its expert should get.
        cache: Folder under which their folders will be.
    """
    inputs = {"base": base.key} | {domain: made.key for domain, made in experts.items()}
    texts = {domain: prompts[domain].read_text(encoding="utf-8") for domain in EXPERT_DOMAINS}
    out = []
    for label, (method, parameters) in METHODS.items():
        recipe: dict[str, Any] = {
            "merge_method": method,
            "base_model": str(base.folder),
            "models": [{"model": str(experts[domain].folder)} for domain in EXPERT_DOMAINS],
            "parameters": {"weight": 1.0, **parameters},
        }
        made = key(__version__, inputs, method, parameters)
        folder = cache / "models" / f"dense-{label.lower()}-{made}"
        out.append(Made(f"{label} dense", "dense", folder, made, label, recipe=recipe))
    for router, gate in ROUTERS.items():
        for label, (method, parameters) in METHODS.items():
            recipe = {
                "base_model": str(base.folder),
                **gate,
                "experts_per_token": EXPERTS_PER_TOKEN,
                "experts": [
                    {
                        "source_model": str(experts[domain].folder),
                        "prompts_file": str(prompts[domain]),
                    }
                    for domain in EXPERT_DOMAINS
                ],
                "merge": {"method": method, "parameters": parameters},
            }
            settings = {k: v for k, v in recipe.items() if k not in ("base_model", "experts")}
            made = key(__version__, inputs, texts, settings)
            folder = cache / "models" / f"moe-{label.lower()}-{router}-{made}"
            name = f"{label} MoE, {router} router"
            out.append(Made(name, "moe", folder, made, label, router, recipe))
    return out


def write_recipe(model: Made, folder: Path) -> Path:
    """Write ``model``'s recipe into ``folder`` and return the file."""
    command = "merge" if model.kind == "dense" else "moe"
    parts = [model.kind, model.method, *([model.router] if model.router else [])]
    file = folder / ("-".join(parts).lower() + ".yaml")
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(dict(model.recipe), sort_keys=False, width=1000)
    file.write_text(f"# mergeme {command} {file.name} OUT\n{text}", encoding="utf-8")
    return file


def build(model: Made, recipe: Path, *, fresh: bool) -> bool:
    """Make ``model``'s checkpoint by its recipe unless it is there; say whether it was made."""
    from mergeme_ext.assembly import build_moe
    from mergeme_ext.merging import merge

    if fresh and model.folder.exists():
        shutil.rmtree(model.folder)
    if (model.folder / "config.json").is_file():
        return False
    make = merge if model.kind == "dense" else build_moe
    make(recipe, model.folder)
    return True

"""What the folder of an MoE model says about itself: README.md and the recipe."""

from typing import Any

import yaml

from mergeme_ext.assembly.recipe import MoESpec
from mergeme_ext.io import portable_name

__all__ = ["model_card", "recipe_text"]


def recipe_text(spec: MoESpec) -> str:
    """Return the recipe as YAML that ``load_moe_spec`` reads, with models by public name."""
    return yaml.safe_dump(spec.document(), sort_keys=False, allow_unicode=True, width=100)


def model_card(spec: MoESpec, recipe: str) -> str:
    """Return README.md, with front matter as the Hub reads it."""
    experts = [portable_name(expert.source_model) for expert in spec.experts]
    experts += [portable_name(spec.base_model)] * spec.base_as_expert
    parents = dict.fromkeys([portable_name(spec.base_model), *experts])
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["merge", "moe", "mixtral", "mergeme"],
    }
    # The Hub takes only names of its own here, and they have a slash.
    if hub := [name for name in parents if "/" in name]:
        front |= {"base_model": hub, "base_model_relation": "merge"}
    rows = "\n".join(f"| {e} | {name} |" for e, name in enumerate(experts))
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# Mixture of {len(experts)} experts

A `MixtralForCausalLM` made by mergeme_ext without training. Each token goes through
{spec.experts_per_token} of {len(experts)} experts. Everything but the MLPs is merged with
`{spec.merge.method}`; the routers start as `{spec.gate_mode}`.

| expert | MLPs of |
| ---: | --- |
{rows}

Base: {portable_name(spec.base_model)}. The recipe (`mergeme_config.yml`):

```yaml
{recipe.strip()}
```
"""

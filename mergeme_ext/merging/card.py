"""The texts that go with a merged model: its card and its recipe, free of local paths."""

import yaml

from mergeme_ext.merging.registry import MergeMethod
from mergeme_ext.merging.spec import MergeSpec

__all__ = ["CONFIG_NAME", "model_card", "recipe_text"]

CONFIG_NAME = "mergeme_config.yml"

_CARD = """---
library_name: transformers
tags:
- merge
- mergeme
{base}pipeline_tag: text-generation
---
# Merged model

Merged by mergeme_ext with the method `{method}` ({paper}).

{ingredients}

The recipe (also in `{config}`):

```yaml
{recipe}```
"""


def recipe_text(spec: MergeSpec) -> str:
    """Return ``spec`` as a YAML recipe, with models by public name instead of by path."""
    return yaml.safe_dump(spec.document(), sort_keys=False, allow_unicode=True)


def model_card(spec: MergeSpec, method: MergeMethod) -> str:
    """Return the README.md of the merged model."""
    models = [model.name for model in spec.models]
    base = None if spec.base is None else spec.base.name
    lines = [f"- `{model}`" for model in models]
    if base is not None:
        lines.insert(0, f"- `{base}` (base)")
    # The hub knows models as owner/name; a bare folder name would be a broken link there.
    hub = [name for name in dict.fromkeys([base, *models]) if name and "/" in name]
    front = "".join(f"- {name}\n" for name in hub)
    return _CARD.format(
        base=f"base_model:\n{front}base_model_relation: merge\n" if hub else "",
        method=method.name,
        paper=method.paper,
        ingredients="\n".join(lines),
        config=CONFIG_NAME,
        recipe=recipe_text(spec),
    )

"""The texts that go with a merged model: its card and its recipe, free of local paths."""

from collections.abc import Mapping

import yaml

from mergeme_ext.merging.registry import MergeMethod
from mergeme_ext.merging.spec import MergeSpec, ModelRef

__all__ = ["CONFIG_NAME", "model_card", "recipe_text"]

CONFIG_NAME = "mergeme_config.yml"

_CARD = """---
library_name: transformers
tags:
- merge
- mergeme
{base}{licence}pipeline_tag: text-generation
---
# Merged model

Merged by mergeme_ext with the method `{method}` ({paper}).

{ingredients}

{terms}

The recipe (also in `{config}`):

```yaml
{recipe}```
"""


def recipe_text(spec: MergeSpec) -> str:
    """Return ``spec`` as a YAML recipe, with models by public name instead of by path."""
    return yaml.safe_dump(spec.document(), sort_keys=False, allow_unicode=True)


def model_card(
    spec: MergeSpec, method: MergeMethod, licences: Mapping[ModelRef, str | None]
) -> str:
    """Return the README.md of the merged model.

    Args:
        spec: Of the merge.
        method: Its method.
        licences: Of each input, as its folder states it.
    """
    models = list(spec.references)
    lines = []
    for model in models:
        base = " (base)" if model == spec.base else ""
        lines.append(f"- `{model.name}`{base}: {_licence_words(licences.get(model))}")
    stated = set(licences.values())
    shared = stated.pop() if len(stated) == 1 else None
    if shared is not None:
        terms = f"All of them are under `{shared}`."
    else:
        terms = (
            "The inputs' licences differ, or are not all stated: whoever passes this model on must "
            "see to the terms of each of them."
        )
    # The hub knows models as owner/name; a bare folder name would be a broken link there.
    names = [model.name for model in models if model.document is None]
    hub = [name for name in dict.fromkeys(names) if "/" in name]
    front = "".join(f"- {name}\n" for name in hub)
    return _CARD.format(
        base=f"base_model:\n{front}base_model_relation: merge\n" if hub else "",
        licence=yaml.safe_dump({"license": shared}) if shared is not None else "",
        method=method.name,
        paper=method.paper,
        ingredients="\n".join(lines),
        terms=terms,
        config=CONFIG_NAME,
        recipe=recipe_text(spec),
    )


def _licence_words(licence: str | None) -> str:
    return "licence not stated" if licence is None else f"licence `{licence}`"

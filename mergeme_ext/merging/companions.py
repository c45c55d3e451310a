"""Writes what goes with merged weights: configuration, tokenizer, chat template, card, recipe."""

import json
from typing import TYPE_CHECKING, Any

from mergeme_ext.io import CheckpointSink, copy_companions, licence_of, load_json_object
from mergeme_ext.io.companions import TEMPLATE_FILES, TOKENIZER_FILES
from mergeme_ext.merging.card import CONFIG_NAME, model_card, recipe_text

if TYPE_CHECKING:
    from mergeme_ext.merging.engine import MergePlan

__all__ = ["write_companions"]

_GENERATION = "generation_config.json"


def write_companions(
    plan: "MergePlan", sink: CheckpointSink, *, with_card: bool, copy_tokenizer: bool
) -> None:
    """Write everything but weights and report into ``sink``.

    Args:
        plan: Of the merge.
        sink: Open.
        with_card: Write ``README.md``.
        copy_tokenizer: Copy the lead's tokenizer, or write the merged one.
    """
    if plan.config:
        sink.write_text("config.json", _json(plan.config))
    skip: set[str] = set()
    if not copy_tokenizer:
        skip.update(TOKENIZER_FILES, TEMPLATE_FILES)
    elif plan.vocabulary is not None:
        own_template = plan.spec.chat_template is None
        skip.update(plan.vocabulary.write(sink, chat_template=own_template))
        skip.update(_write_generation_config(plan, sink))
    if plan.spec.chat_template is not None:
        from mergeme_ext.vocabulary import resolve_chat_template

        folders = [source.tokenizer_folder for source in plan.sources.values()]
        name, text = resolve_chat_template(plan.spec.chat_template, folders)
        sink.write_text(name, text)
        skip.update(TEMPLATE_FILES)
    copy_companions(plan.lead, sink, skip=skip)
    if with_card:
        sink.write_text("README.md", _card(plan))
    sink.write_text(CONFIG_NAME, recipe_text(plan.spec))


def _card(plan: "MergePlan") -> str:
    licences = {ref: licence_of(ref.path) for ref in plan.sources}
    return model_card(plan.spec, plan.method, licences)


def _write_generation_config(plan: "MergePlan", sink: CheckpointSink) -> list[str]:
    """Write the lead's generation config with the new ids of its special tokens."""
    path = plan.lead.path / _GENERATION
    if not path.is_file():
        return []
    config = load_json_object(path.read_bytes(), str(path))
    sink.write_text(_GENERATION, _json(plan.vocabulary.config_changes(config)))
    return [_GENERATION]


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"

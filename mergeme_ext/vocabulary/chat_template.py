"""Chat templates: the usual formats by name, and the one that most models of a merge have."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from mergeme_ext.io.format import load_json_object
from mergeme_ext.vocabulary.tokenizer import CONFIG, VocabularyError

__all__ = ["CHAT_TEMPLATES", "read_chat_template", "resolve_chat_template"]

TEMPLATE_FILE = "chat_template.jinja"
_OLD_FILE = "chat_template.json"

# Each is written for the format that its models document. Tags trim the white space around them,
# so all that gets into a prompt stands within {{ }}.
_ALPACA = """\
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- '### Instruction:\\n' ~ (message['content'] | trim) ~ '\\n\\n' -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- '### Response:\\n' ~ (message['content'] | trim) ~ eos_token ~ '\\n\\n' -}}
  {%- elif message['role'] == 'system' -%}
    {{- (message['content'] | trim) ~ '\\n\\n' -}}
  {%- else -%}
    {{- raise_exception('this chat format has no role ' ~ message['role']) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '### Response:\\n' -}}
{%- endif -%}
"""

_CHATML = """\
{%- for message in messages -%}
  {{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_EXAONE = """\
{%- if messages[0]['role'] != 'system' -%}
  {{- '[|system|][|endofturn|]\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {{- '[|' ~ message['role'] ~ '|]' ~ message['content'] -}}
  {{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '[|assistant|]' -}}
{%- endif -%}
"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
  {{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' -}}
  {{- (message['content'] | trim) ~ '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

# The format has no system role: its text goes before the first instruction.
_MISTRAL = """\
{{- bos_token -}}
{%- set state = namespace(before='') -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {%- set state.before = (message['content'] | trim) ~ '\\n\\n' -%}
  {%- elif message['role'] == 'user' -%}
    {{- '[INST] ' ~ state.before ~ (message['content'] | trim) ~ ' [/INST]' -}}
    {%- set state.before = '' -%}
  {%- elif message['role'] == 'assistant' -%}
    {{- ' ' ~ (message['content'] | trim) ~ eos_token -}}
  {%- else -%}
    {{- raise_exception('this chat format has no role ' ~ message['role']) -}}
  {%- endif -%}
{%- endfor -%}
"""

CHAT_TEMPLATES: Mapping[str, str] = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}


def resolve_chat_template(text: str, folders: Sequence[str | Path]) -> tuple[str, str]:
    """Return the name of the file for a chat template, and what to write into it.

    Args:
        text: ``auto``, a name in ``CHAT_TEMPLATES``, or a template. ``auto`` is the template that
            most of the folders have; of equally frequent ones, the one found first.
        folders: The models of the merge, in order.

    Raises:
        VocabularyError: It is none of these, or ``auto`` and no folder has a template.
    """
    if text == "auto":
        found = [read_chat_template(folder) for folder in folders]
        counts = Counter(template for template in found if template is not None)
        if not counts:
            raise VocabularyError("chat_template auto: none of the models has a chat template")
        return TEMPLATE_FILE, counts.most_common(1)[0][0]
    if text in CHAT_TEMPLATES:
        return TEMPLATE_FILE, CHAT_TEMPLATES[text]
    if "{{" not in text and "{%" not in text:
        names = ", ".join(["auto", *CHAT_TEMPLATES])
        raise VocabularyError(f"expected chat_template to be {names} or a template, got {text!r}")
    return TEMPLATE_FILE, text


def read_chat_template(folder: str | Path) -> str | None:
    """Return the chat template in a model's folder, from whichever file it is in; None if none.

    Raises:
        CheckpointError: A file is no JSON object.
    """
    folder = Path(folder)
    own = folder / TEMPLATE_FILE
    if own.is_file():
        return own.read_text(encoding="utf-8")
    for name in (_OLD_FILE, CONFIG):
        path = folder / name
        if path.is_file():
            value = load_json_object(path.read_bytes(), str(path)).get("chat_template")
            if isinstance(value, str):
                return value
            if isinstance(value, list):
                # Several by name; the one without a purpose is called default.
                named = {entry.get("name"): entry.get("template") for entry in value}
                if isinstance(named.get("default"), str):
                    return named["default"]
    return None

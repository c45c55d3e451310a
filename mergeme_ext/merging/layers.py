"""Finds stacks of layers by the names of tensors, never by the shape of one layer."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergeme_ext.io.names import LAYER_WORDS

__all__ = ["Stack", "find_stacks", "layer_counts", "layer_section", "main_stack", "position"]

COUNT_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
# Where a composite model's config.json describes a module.
_SECTIONS = {
    "text_decoder": ("text_config", "llm_config", "language_config"),
    "vision_tower": ("vision_config",),
    "audio_tower": ("audio_config",),
    "encoder": ("encoder",),
    "decoder": ("decoder",),
}
# Keys that models with an encoder and a decoder have for each.
_COUNT_KEYS_OF = {
    "encoder": ("encoder_layers", "num_encoder_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
# Layers that follow the stack and predict further tokens: in the files, not in num_hidden_layers.
PREDICTORS = "num_nextn_predict_layers"


@dataclass(frozen=True)
class Stack:
    """Layers whose tensors are called ``prefix``, a number, and the rest.

    Attributes:
        prefix: Such as ``model.layers.``.
        layers: For each layer, from the rest of the name (``.mlp.up_proj.weight``) to the name.
            Layers may hold different tensors.
        beyond: Names with numbers past the last layer.
    """

    prefix: str
    layers: Sequence[Mapping[str, str]]
    beyond: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.layers)

    def position(self, layer: int) -> float:
        """Return where ``layer`` is: 0 for the first, 1 for the last."""
        return position(layer, len(self))


def position(layer: int, count: int) -> float:
    """Return where ``layer`` of ``count`` is: from 0 for the first to 1 for the last.

    A single layer is at 1, so it takes a gradient's last anchor, as in the recipes people share.
    """
    return layer / (count - 1) if count > 1 else 1.0


def find_stacks(names: Iterable[str], config: Mapping[str, Any]) -> list[Stack]:
    """Return the stacks of layers among the tensors called ``names``, the largest first.

    A layer's number is the first number in a name. What comes before it is a stack if it ends in
    a word that stacks are known by, or if it has as many layers as ``config`` says.

    Args:
        names: Of tensors.
        config: The model's ``config.json``; may be empty.
    """
    groups: dict[str, dict[int, dict[str, str]]] = {}
    for name in names:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if number is not None:
            prefix = "".join(part + "." for part in parts[:number])
            rest = "".join("." + part for part in parts[number + 1 :])
            groups.setdefault(prefix, {}).setdefault(int(parts[number]), {})[rest] = name
    counts = set(layer_counts(config))
    stacks, others = [], []
    for prefix, layers in groups.items():
        stack = _stack(prefix, layers, config)
        whole = set(layers) == set(range(max(layers) + 1))
        if _word(prefix) in LAYER_WORDS or (whole and len(stack) in counts):
            stacks.append(stack)
        elif whole and len(stack) > 1:
            others.append(stack)
    if not stacks and others:
        stacks = [max(others, key=_size)]
    return sorted(stacks, key=_size, reverse=True)


def _stack(
    prefix: str, layers: Mapping[int, Mapping[str, str]], config: Mapping[str, Any]
) -> Stack:
    count = max(layers) + 1
    predictors = next((s[PREDICTORS] for s in _sections(config) if s.get(PREDICTORS)), 0)
    if predictors and count not in layer_counts(config):
        count -= predictors if count - predictors in layer_counts(config) else 0
    beyond = [name for i in sorted(layers) if i >= count for name in layers[i].values()]
    return Stack(prefix, [layers.get(i, {}) for i in range(count)], beyond)


def _word(prefix: str) -> str:
    return prefix.rstrip(".").rsplit(".", 1)[-1]


def _size(stack: Stack) -> int:
    return sum(map(len, stack.layers))


def layer_counts(config: Mapping[str, Any]) -> list[int]:
    """Return the numbers of layers that ``config`` states, of the model and of its parts."""
    return [s[key] for s in _sections(config) for key in COUNT_KEYS if isinstance(s.get(key), int)]


def _sections(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Give ``config`` and the parts of it that could describe modules, the text's first."""
    yield config
    parts = {key: value for key, value in config.items() if isinstance(value, Mapping)}
    yield from (parts[key] for key in _SECTIONS["text_decoder"] if key in parts)
    yield from (part for key, part in parts.items() if key not in _SECTIONS["text_decoder"])


def main_stack(stacks: Sequence[Stack], config: Mapping[str, Any]) -> Stack | None:
    """Return the stack that slices are cut from; None if there is none, or no telling which."""
    if len(stacks) == 1:
        return stacks[0]
    counts = layer_counts(config)
    fitting = [stack for stack in stacks if len(stack) in counts[:1]]
    return fitting[0] if len(fitting) == 1 else None


def layer_section(
    config: dict[str, Any], stack: Stack, module: str | None
) -> tuple[dict[str, Any], str] | None:
    """Return the part of ``config`` that describes ``stack``, and the key of its layer count.

    Args:
        config: A model's ``config.json``.
        stack: Of that model.
        module: Name of the module that the stack belongs to, if the recipe says one.

    Returns:
        A view into ``config``, not a copy; None if no part states the stack's number of layers.
    """
    module = module or ""
    named = [config.get(key) for key in _SECTIONS.get(module, ())]
    for section in [*named, *_sections(config)]:
        if isinstance(section, dict):
            for key in (*_COUNT_KEYS_OF.get(module, ()), *COUNT_KEYS):
                if section.get(key) == len(stack):
                    return section, key
    return None

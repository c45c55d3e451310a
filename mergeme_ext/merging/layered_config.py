"""Re-derives what config.json says of single layers when slices put them in another order."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergeme_ext.io import CheckpointError
from mergeme_ext.merging.layers import PREDICTORS

__all__ = ["OriginalLayer", "rederive"]


@dataclass(frozen=True)
class OriginalLayer:
    """A layer of a model: what the model's configuration says of its layers, and which it is."""

    config: Mapping[str, Any]
    index: int
    model: str


# Lists with a value for each layer, whatever their length; others are known by length and name.
_PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "no_rope_layers",
    "num_key_value_heads",
    "num_query_heads",
    "intermediate_size",
    "ffn_multipliers",
    "moe_layer_freq",
    "hybrid_override_pattern",
)
# Lists of layers' numbers.
_NUMBERS = (
    "mlp_only_layers",
    "moe_layers",
    "cross_attention_layers",
    "full_attn_idxs",
    "fullatt_block_indexes",
    "attn_layer_indices",
)
_SPARSE_STEP, _DENSE_LAYERS = "decoder_sparse_step", "mlp_only_layers"
# One number that says what every layer is: what layer i is by it; and the list that goes first.
_Rule = tuple[Callable[[Mapping[str, Any], int], Any], str | None]
_RULES: dict[str, _Rule] = {
    "first_k_dense_replace": (lambda c, i: i < c["first_k_dense_replace"], "mlp_layer_types"),
    "moe_layer_start_index": (lambda c, i: i >= c["moe_layer_start_index"], None),
    "moe_layer_end_index": (
        lambda c, i: c["moe_layer_end_index"] < 0 or i <= c["moe_layer_end_index"],
        None,
    ),
    "max_window_layers": (
        lambda c, i: bool(c.get("use_sliding_window")) and i >= c["max_window_layers"],
        "layer_types",
    ),
    "moe_layer_freq": (lambda c, i: i % c["moe_layer_freq"] == 0, "mlp_layer_types"),
    "sliding_window_pattern": (
        lambda c, i: (i + 1) % c["sliding_window_pattern"] == 0,
        "layer_types",
    ),
    "full_attention_interval": (
        lambda c, i: (i + 1) % c["full_attention_interval"] == 0,
        "layer_types",
    ),
    "interleave_moe_layer_step": (
        lambda c, i: (i + 1) % c["interleave_moe_layer_step"] == 0,
        "moe_layers",
    ),
    "no_rope_layer_interval": (
        lambda c, i: (i + 1) % c["no_rope_layer_interval"] == 0,
        "no_rope_layers",
    ),
    "global_attn_every_n_layers": (
        lambda c, i: i % c["global_attn_every_n_layers"] == 0,
        "layer_types",
    ),
    "attn_layer_period": (
        lambda c, i: i % c["attn_layer_period"] == c.get("attn_layer_offset", 0),
        "layers_block_type",
    ),
    "expert_layer_period": (
        lambda c, i: i % c["expert_layer_period"] == c.get("expert_layer_offset", 0),
        None,
    ),
}
# Of these another number may say it.
_THRESHOLDS = (
    "first_k_dense_replace",
    "max_window_layers",
    "moe_layer_start_index",
    "moe_layer_end_index",
)
_LOOKS_LAYERED = re.compile(r"layer|block_type|_idxs|_indexes|_indices")
_PERIODIC = re.compile(r"layer.*(period|interval|step|freq)|every_n_layer")


def rederive(
    config: dict[str, Any], count_key: str, layers: Sequence[Sequence[OriginalLayer]]
) -> None:
    """Make ``config`` describe a stack of ``layers``.

    Args:
        config: Describes the layers of the lead; changed in place.
        count_key: Its key for the number of layers.
        layers: For each layer of the result, the layers it is merged from.

    Raises:
        CheckpointError: ``config`` has no way to describe the result, or it is not known which.
    """
    old_count = config[count_key]
    before = dict(config)
    config[count_key] = len(layers)
    if config.get(PREDICTORS):
        config[PREDICTORS] = 0
    in_order = len(layers) == old_count and all(
        original.index == j for j, group in enumerate(layers) for original in group
    )
    originals = [original.config for group in layers for original in group]
    still_true = {
        key
        for key, value in before.items()
        if in_order and all(original.get(key) == value for original in originals)
    }
    sparse_steps = _SPARSE_STEP in before and not {_SPARSE_STEP, _DENSE_LAYERS} <= still_true
    if sparse_steps:
        config[_DENSE_LAYERS] = [
            j for j, g in enumerate(layers) if _agreed(_DENSE_LAYERS, g, _dense)
        ]
        config[_SPARSE_STEP] = 1
    for key, value in before.items():
        if key in still_true or key == count_key or (sparse_steps and key == _DENSE_LAYERS):
            continue
        if isinstance(value, list | str) and key in _PER_LAYER:
            one_each = [_agreed(key, g, lambda o, k=key: _item(o, k)) for g in layers]
            config[key] = "".join(one_each) if isinstance(value, str) else one_each
        elif isinstance(value, list) and key in _NUMBERS:
            config[key] = [
                j
                for j, g in enumerate(layers)
                if _agreed(key, g, lambda o, k=key: o.index in (o.config.get(k) or ()))
            ]
        elif isinstance(value, list) and value and _LOOKS_LAYERED.search(key):
            if len(value) != old_count:
                raise _cannot(key, value, "what it says of layers is not known")
            config[key] = [_agreed(key, g, lambda o, k=key: _item(o, k)) for g in layers]
        elif key == "num_kv_shared_layers" and value:
            raise _cannot(key, value, "its layers use others' keys and values")
        elif type(value) is int and key in _RULES:
            _follow(config, key, layers)
        elif type(value) is int and value > 1 and _PERIODIC.search(key) and key != _SPARSE_STEP:
            raise _cannot(key, value, "what it says of layers is not known")


def _dense(layer: OriginalLayer) -> bool:
    """Whether a layer has one MLP where its model's others have experts."""
    step = layer.config.get(_SPARSE_STEP, 1)
    return layer.index in (layer.config.get(_DENSE_LAYERS) or ()) or (layer.index + 1) % step != 0


def _item(layer: OriginalLayer, key: str) -> Any:
    value = layer.config.get(key)
    if not isinstance(value, list | str) or layer.index >= len(value):
        raise CheckpointError(
            f"{layer.model}: config.json: expected {key} to have a value for layer {layer.index}, "
            f"got {value!r}"
        )
    return value[layer.index]


def _agreed(
    key: str, group: Sequence[OriginalLayer], value_of: Callable[[OriginalLayer], Any]
) -> Any:
    """Return what all layers that merge into one are; they must be the same."""
    first, *others = group
    wanted = value_of(first)
    for other in others:
        if (found := value_of(other)) != wanted:
            raise CheckpointError(
                f"layer {other.index} of {other.model} cannot be merged with layer {first.index} "
                f"of {first.model}: by {key} of config.json they differ in kind ({found!r} and "
                f"{wanted!r})"
            )
    return wanted


def _follow(config: dict[str, Any], key: str, layers: Sequence[Sequence[OriginalLayer]]) -> None:
    """Make rule ``key`` say of every layer what it said of the original, if it can."""
    rule, list_first = _RULES[key]

    def of_original(layer: OriginalLayer) -> Any:
        return rule(layer.config, layer.index) if key in layer.config else None

    wanted = [_agreed(key, group, of_original) for group in layers]
    tried = [config[key]] + (list(range(len(layers) + 1)) if key in _THRESHOLDS else [])
    for value in tried:
        if [rule(config | {key: value}, j) for j in range(len(layers))] == wanted:
            config[key] = value
            return
    if list_first is not None and isinstance(config.get(list_first), list):
        return  # the list is right, and models go by it
    raise _cannot(key, config[key], "no value of it describes the layers that the slices give")


def _cannot(key: str, value: Any, reason: str) -> CheckpointError:
    return CheckpointError(
        f"config.json: {key} = {value!r} cannot be carried over to the slices: {reason}"
    )

"""config.json of a Mixtral model made of LLaMA- or Mistral-shaped ones."""

from collections.abc import Mapping
from typing import Any

from mergeme_ext.io import CheckpointError

__all__ = ["check_agreement", "dense_config", "mixtral_config"]

# What transformers assumes for a key that config.json leaves out. Mixtral's own defaults differ
# (its rope_theta is 1e6, for one), so every one of these is written out.
_COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "pad_token_id": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_DEFAULTS = {
    "llama": _COMMON
    | {"max_position_embeddings": 2048, "num_key_value_heads": None, "sliding_window": None},
    "mistral": _COMMON
    | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
}
_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)
_STRUCTURE = (
    *_REQUIRED,
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "tie_word_embeddings",
)
_SETTINGS = ("rope_parameters", "rms_norm_eps", "sliding_window", "max_position_embeddings")


def dense_config(config: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Return the fields of a LLaMA or Mistral ``config`` that matter here, defaults filled in.

    Args:
        config: config.json, as transformers 4 or 5 writes it.
        model: Its name in messages.

    Returns:
        A new dict; rotary settings are under ``rope_parameters`` with ``rope_type`` and
        ``rope_theta``, wherever the file had them.

    Raises:
        CheckpointError: The architecture is another one, a field is missing, or the model needs
            something that Mixtral cannot hold.
    """
    kind = config.get("model_type")
    if kind not in _DEFAULTS:
        raise CheckpointError(
            f"{model}: expected model_type to be one of {sorted(_DEFAULTS)}, got {kind!r}"
        )
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        raise CheckpointError(f"{model}: expected config.json to hold {missing}, which are missing")
    fields = {key: config[key] for key in _REQUIRED}
    fields |= {key: config.get(key, default) for key, default in _DEFAULTS[kind].items()}
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if fields["head_dim"] is None:
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    if kind == "mistral" and config.get("use_sliding_window") is False:
        fields["sliding_window"] = None
    fields["rope_parameters"] = _rope(config, model)
    _refuse_what_mixtral_lacks(config, fields, model)
    return fields


def _rope(config: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Rotary settings in the form of transformers 5, from either form."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise CheckpointError(
            f"{model}: expected one set of rope_parameters for all layers, got {sorted(rope)}"
        )
    old_name = rope.pop("type", None)
    rope.setdefault("rope_type", old_name or "default")
    rope.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    partial = rope.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise CheckpointError(
            f"{model}: expected partial_rotary_factor 1, as Mixtral has no other, got {partial}"
        )
    return rope


def _refuse_what_mixtral_lacks(
    config: Mapping[str, Any], fields: Mapping[str, Any], model: str
) -> None:
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise CheckpointError(
                f"{model}: expected {key}: false, as Mixtral's layers have no bias to put it in, "
                "got true"
            )
    if fields["hidden_act"] != "silu":
        raise CheckpointError(f"{model}: expected hidden_act silu, got {fields['hidden_act']!r}")
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{model}: expected unquantised weights, got a quantization_config; dequantise first"
        )
    layer_types = set(config.get("layer_types") or ())
    if len(layer_types) > 1:
        raise CheckpointError(
            f"{model}: expected the same attention in all layers, as in Mixtral, "
            f"got layer_types {sorted(layer_types)}"
        )


def check_agreement(
    base: Mapping[str, Any], base_name: str, other: Mapping[str, Any], other_name: str
) -> list[str]:
    """Compare two results of ``dense_config``.

    Returns:
        One sentence for each setting that differs and where the base's value will be used.

    Raises:
        CheckpointError: The two differ in structure.
    """
    for key in _STRUCTURE:
        if base[key] != other[key]:
            raise CheckpointError(
                f"{other_name}: expected {key} {base[key]!r} as in {base_name}, got {other[key]!r}"
            )
    return [
        f"{other_name} has {key} {other[key]!r}; the result uses {base[key]!r} of {base_name}"
        for key in _SETTINGS
        if base[key] != other[key]
    ]


def mixtral_config(
    dense: Mapping[str, Any], *, num_experts: int, experts_per_token: int, dtype: str
) -> dict[str, Any]:
    """Return config.json of ``MixtralForCausalLM`` around ``dense``.

    Args:
        dense: From ``dense_config``.
        num_experts: E.
        experts_per_token: K.
        dtype: Name of the weights' dtype, such as "bfloat16".

    Returns:
        The fields in alphabetical order. Rotary settings stand there twice, as ``rope_theta`` and
        ``rope_scaling`` (transformers 4 and most converters) and as ``rope_parameters``
        (transformers 5); the dtype as ``dtype`` and ``torch_dtype`` for the same reason.
    """
    rope = dict(dense["rope_parameters"])
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return dict(
        sorted(
            {
                **dense,
                "architectures": ["MixtralForCausalLM"],
                "dtype": dtype,
                "model_type": "mixtral",
                "num_experts_per_tok": experts_per_token,
                "num_local_experts": num_experts,
                "output_router_logits": False,
                "rope_parameters": rope,
                "rope_scaling": None if rope["rope_type"] == "default" else scaling,
                "rope_theta": rope["rope_theta"],
                "router_aux_loss_coef": 0.001,
                "router_jitter_noise": 0.0,
                "torch_dtype": dtype,
                "use_cache": True,
            }.items()
        )
    )

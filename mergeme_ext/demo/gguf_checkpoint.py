"""A GGUF file of the LLaMA architecture as an ordinary checkpoint folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergeme_ext.io import CheckpointSink

__all__ = ["convert", "unpermute"]

GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
DERIVED = ("rope_freqs.weight",)  # a table that the model computes itself
GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id")
CONTROL_TOKEN, USER_TOKEN = 3, 4  # GGUF's token types


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return ``weight`` with the rows of each head in the order that transformers expects.

    GGUF files rotate neighbouring rows (0, 1), (2, 3), ... of a head, transformers rotates row i
    with row i + d/2. So row 2i + j of a head goes to row i + j * d/2.

    Args:
        weight: [heads * d, columns], d even.
        heads: Number of heads in it.

    Raises:
        ValueError: The rows cannot be cut into ``heads`` heads of an even size.
    """
    rows, columns = weight.shape
    if rows % (2 * heads):
        raise ValueError(f"expected rows to be a multiple of 2 * {heads} heads, got {rows}")
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def checkpoint_name(name: str) -> str:
    """Return what transformers calls the GGUF tensor ``name``.

    Raises:
        ValueError: It has no place in a LLaMA model.
    """
    if name in GLOBAL_NAMES:
        return GLOBAL_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    raise ValueError(f"GGUF tensor {name!r} has no place in a LLaMA model")


def convert(gguf_file: Path, out: Path, provenance: Mapping[str, Any]) -> Path:
    """Write the checkpoint in ``gguf_file``, dequantised to bfloat16, to the folder ``out``.

    Args:
        gguf_file: A LLaMA model with a byte-level BPE tokenizer.
        out: Folder to make; it appears only when complete.
        provenance: What to say in its provenance.json.

    Returns:
        ``out``.

    Raises:
        ValueError: Another architecture or tokenizer.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(str(gguf_file))
    meta = {key: field.contents() for key, field in reader.fields.items()}
    if meta["general.architecture"] != "llama":
        raise ValueError(f"expected a llama GGUF file, got {meta['general.architecture']!r}")
    tensors = {checkpoint_name(t.name): t for t in reader.tensors if t.name not in DERIVED}
    config = make_config(meta, tied="lm_head.weight" not in tensors)
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config["num_key_value_heads"],
    }
    plan = [
        (name, torch.bfloat16, tuple(int(n) for n in reversed(tensor.shape)))
        for name, tensor in tensors.items()
    ]
    with CheckpointSink(out, plan) as sink:
        for name, _, shape in plan:
            tensor = tensors[name]
            value = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
            value = value.reshape(shape)
            projection = name.split(".")[-2]
            if projection in heads:
                value = unpermute(value, heads[projection])
            sink.write(name, torch.from_numpy(value.copy()).to(torch.bfloat16))
        write_companions(sink, meta, config, provenance)
    return out


def make_config(meta: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """Return config.json from GGUF metadata."""

    def get(key: str, default: Any = None) -> Any:
        return meta.get(f"llama.{key}", default)

    heads, hidden = get("attention.head_count"), get("embedding_length")
    # The file holds 1e-5 as a float32, which is 9.999999747378752e-06 in full.
    epsilon = float(f"{get('attention.layer_norm_rms_epsilon'):.3g}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", hidden // heads),
        "hidden_act": "silu",
        "rms_norm_eps": epsilon,
        "rope_theta": float(get("rope.freq_base", 10000.0)),
        "max_position_embeddings": get("context_length"),
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }


def make_tokenizer(meta: Mapping[str, Any]):
    """Return the tokenizers.Tokenizer that GGUF metadata describes.

    Raises:
        ValueError: It is no byte-level BPE tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if meta["tokenizer.ggml.model"] != "gpt2":
        raise ValueError(
            f"expected a byte-level BPE tokenizer (gpt2), got {meta['tokenizer.ggml.model']!r}"
        )
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    # SmolLM splits every digit off, then follows GPT-2's pattern.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = list(meta["tokenizer.ggml.token_type"])
    for kind, special in ((CONTROL_TOKEN, True), (USER_TOKEN, False)):
        found = [t for t, k in zip(tokens, kinds, strict=True) if k == kind]
        added = [AddedToken(t, special=special, normalized=False) for t in found]
        if special:
            tokenizer.add_special_tokens(added)
        else:
            tokenizer.add_tokens(added)
    return tokenizer


def write_companions(
    sink: CheckpointSink,
    meta: Mapping[str, Any],
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> None:
    def write_json(name: str, value: Any) -> None:
        sink.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    tokens = meta["tokenizer.ggml.tokens"]
    ids = {key: config[f"{key}_token_id"] for key in ("bos", "eos", "pad")}
    ids["unk"] = meta.get("tokenizer.ggml.unknown_token_id")
    special = {f"{key}_token": tokens[i] for key, i in ids.items() if i is not None}
    write_json("config.json", config)
    write_json("generation_config.json", {k: v for k, v in config.items() if k in GENERATION})
    sink.write_text("tokenizer.json", make_tokenizer(meta).to_str())
    write_json(
        "tokenizer_config.json",
        special
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "add_bos_token": bool(meta.get("tokenizer.ggml.add_bos_token", False)),
            "chat_template": meta.get("tokenizer.chat_template"),
        },
    )
    write_json("provenance.json", dict(provenance))

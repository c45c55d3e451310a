"""Tiny checkpoints shaped like LLaMA models, for tests that need files."""

import json

import safetensors.torch
import torch

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
    "dtype": "float32",
}


def llama_tensors(seed=0, dtype=torch.float32, *, layers=2, hidden=16, ffn=24, vocab=40, head=True):
    """Tensors of a LLaMA model: multiples of 1/64, so that bfloat16 holds sums of a few of them."""
    g = torch.Generator().manual_seed(seed)

    def weight(*shape):
        return (torch.randint(-128, 129, shape, generator=g) / 64).to(dtype)

    out = {"model.embed_tokens.weight": weight(vocab, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}."
        out[at + "input_layernorm.weight"] = weight(hidden)
        out[at + "post_attention_layernorm.weight"] = weight(hidden)
        for name, rows in (("q", hidden), ("k", hidden // 2), ("v", hidden // 2), ("o", hidden)):
            out[at + f"self_attn.{name}_proj.weight"] = weight(rows, hidden)
        for name, shape in (
            ("gate", (ffn, hidden)),
            ("up", (ffn, hidden)),
            ("down", (hidden, ffn)),
        ):
            out[at + f"mlp.{name}_proj.weight"] = weight(*shape)
    out["model.norm.weight"] = weight(hidden)
    if head:
        out["lm_head.weight"] = weight(vocab, hidden)
    return out


def save(folder, tensors, config=None, **files):
    """Write a model folder by the reference library; ``files`` are further texts, by stem."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    for stem, text in files.items():
        (folder / f"{stem}.json").write_text(text)
    return folder

"""Tiny checkpoints with a tokenizer, made with transformers."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from mergeme_ext.assembly import build_moe

logging.disable_progress_bar()

WORDS = ["<s>", "</s>", "heart", "liver", "fever", "dose", "def", "return"]
WORDS += ["import", "class", "if", "the", "a", "of", "and", "x"]
SIZES = {
    "vocab_size": len(WORDS) + 3,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def make(
    folder,
    *,
    like=None,
    seed=0,
    shift=0.1,
    dtype=torch.float32,
    shards=False,
    mistral=False,
    **changes,
):
    """Save a random model, or ``like`` with its weights moved a little; return its folder."""
    torch.manual_seed(seed)
    settings = SIZES | {"tie_word_embeddings": False} | changes
    config = (MistralConfig if mistral else LlamaConfig)(**settings)
    model = (MistralForCausalLM if mistral else LlamaForCausalLM)(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(0.2 * torch.randn_like(p))
        if like is not None:
            base = type(model).from_pretrained(like, dtype=torch.float32).state_dict()
            for name, p in model.named_parameters():
                p.mul_(shift).add_(base[name])
    model.to(dtype).save_pretrained(folder, max_shard_size="8KB" if shards else "5GB")
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="x"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="x"
    )
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    return folder


def build(recipe, out, **options):
    build_moe(recipe, out, **options)
    return out


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def everything(folder):
    """The bytes of every file, by name."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }

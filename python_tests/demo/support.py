"""A model and texts so small that the whole demo runs on them in seconds, without a network."""

import json
import random

import torch

from python_tests.support.checkpoints import llama_tensors, save

WORDS = {
    "medicine": ["fever", "dose", "artery", "vitamin", "patient", "acute"],
    "code": ["def", "return", "import", "self", "lambda", "yield"],
    "dialogue": ["hello", "why", "because", "school", "mother", "bus"],
}


def write_base(folder):
    """A tied LLaMA model of two layers with a tokenizer of bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    tensors = llama_tensors(vocab=257, head=False)
    tensors = {name: (0.25 * t).to(torch.bfloat16) for name, t in tensors.items()}
    for name in tensors:
        if "norm" in name:
            tensors[name] = torch.ones_like(tensors[name])
    config = {"vocab_size": 257, "tie_word_embeddings": True, "dtype": "bfloat16"}
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    return save(
        folder,
        tensors,
        {**config, "eos_token_id": 256, "pad_token_id": 256, "bos_token_id": 256},
        tokenizer=tokenizer.to_str(),
        tokenizer_config=json.dumps(names),
    )


def write_texts(folder):
    """Domain -> a file of that domain's words."""
    draw = random.Random(0)
    files = {}
    for domain, words in WORDS.items():
        lines = [" ".join(draw.choices(words, k=60)) for _ in range(60)]
        files[domain] = folder / f"{domain}.jsonl"
        files[domain].write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return files

"""Makes checkpoints of a chosen size: a LLaMA-shaped base and models fine-tuned from it."""

import itertools
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from mergeme_ext.io.format import TensorInfo, encode_header
from mergeme_ext.io.names import dense_shapes

__all__ = ["config_of_size", "make_checkpoints", "weights_bytes"]

HIDDEN = (64, 128, 256, 512, 1024, 2048, 3072, 4096, 6144, 8192)
MOST_LAYERS = 28
# Normal noise to draw from at random offsets: a new number for every weight would take longer than
# the merges.
POOL = 1 << 22
CHUNK = 1 << 20
WEIGHT, DELTA = 0.02, 2e-3


def _config(hidden: int, layers: int) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": min(32000, 32 * hidden),
        "hidden_size": hidden,
        "intermediate_size": 11 * hidden // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def weights_bytes(config: dict) -> int:
    """Bytes of a model's weights in bfloat16."""
    return 2 * sum(map(math.prod, dense_shapes(config).values()))


def config_of_size(nbytes: int) -> dict:
    """The config of a model of about ``nbytes`` in bfloat16, with a plausible width and depth."""
    for hidden in HIDDEN:
        none, one = (weights_bytes(_config(hidden, layers)) for layers in (0, 1))
        layers = max(1, round((nbytes - none) / (one - none)))
        if layers <= MOST_LAYERS:
            break
    return _config(hidden, layers)


def make_checkpoints(folder: Path, nbytes: int, names: list[str], *, seed: int = 0) -> list[Path]:
    """Write ``base`` and the models ``names``; return their folders, the base's first.

    The models' deltas have a deviation of DELTA and a part in common, so that their cosine is
    about a quarter.
    """
    config = config_of_size(nbytes)
    shapes = dense_shapes(config)
    infos = [TensorInfo(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    folders = [folder / name for name in ("base", *names)]
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(POOL + CHUNK, generator=generator)

    def noise(numel: int) -> Tensor:
        start = int(torch.randint(POOL, (), generator=generator))
        return pool[start : start + numel]

    files = []
    for path in folders:
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config, indent=2))
        files.append((path / "model.safetensors").open("wb"))
        files[-1].write(encode_header(infos, {"format": "pt"}))
    for info in infos:
        norm = len(info.shape) == 1
        for start in range(0, info.numel, CHUNK):
            numel = min(CHUNK, info.numel - start)
            base = WEIGHT * noise(numel) + (1.0 if norm else 0.0)
            shared = noise(numel)
            models = [base + DELTA * (0.5 * shared + math.sqrt(0.75) * noise(numel)) for _ in names]
            for file, weights in zip(files, itertools.chain([base], models), strict=True):
                file.write(weights.bfloat16().view(torch.uint8).numpy().data)
    for file in files:
        file.close()
    return folders

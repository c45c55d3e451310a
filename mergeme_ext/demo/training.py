"""Fine-tunes the base into an expert, quickly, on a CPU."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from mergeme_ext.demo.language_model import load_model, next_token_loss
from mergeme_ext.io import CheckpointSink, CheckpointSource, copy_companions, names

__all__ = ["Training", "fine_tune"]


@dataclass(frozen=True)
class Training:
    """How an expert is made.

    Attributes:
        steps: Updates of the weights.
        rows: Rows of tokens in each.
        row_tokens: Tokens in a row.
        learning_rate: Its highest value; it rises for a sixth of the steps and then falls along a
            cosine to a tenth.
        weight_decay: Of matrices.
        clip: Longest gradient.
    """

    steps: int = 24
    rows: int = 2
    row_tokens: int = 256
    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """Return the learning rate of ``step``, from 0."""
        warmup = max(1, self.steps // 6)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def fine_tune(
    base: Path,
    rows: Tensor,
    out: Path,
    training: Training,
    dtype: torch.dtype,
    report: Callable[[int, float, float, float], None],
) -> Path:
    """Write ``base``, fine-tuned on ``rows``, to the checkpoint folder ``out``.

    Everything but the embedding and the output head learns, so that experts of one base share
    them. Weights and optimiser stay in float32 meanwhile: bfloat16 would lose small updates.

    Args:
        base: Folder of a checkpoint.
        rows: [R, L] int64 tokens, used in order and again from the start when they end.
        out: Folder to make; it appears only when complete.
        training: How.
        dtype: Of the matrix products.
        report: Called after each step with its number, its loss, the tokens per second and the
            seconds so far.

    Returns:
        ``out``.
    """
    model = load_model(base).train()
    frozen = {names.EMBEDDING, names.HEAD}
    learned = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
        if name not in frozen:
            learned.append(parameter)
    groups = [
        {"params": [p for p in learned if p.dim() > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in learned if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    losses = []
    started = time.perf_counter()
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.rate(step)
        wanted = torch.arange(step * training.rows, (step + 1) * training.rows) % len(rows)
        loss = next_token_loss(model, rows[wanted], dtype)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, training.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(loss.item(), 4))
        seconds = time.perf_counter() - started
        tokens = (step + 1) * wanted.numel() * rows.shape[1]
        report(step + 1, losses[-1], tokens / seconds, seconds)
    log = {**asdict(training), "dtype": str(dtype), "seconds": round(seconds, 1), "losses": losses}
    save(base, model, out, log)
    return out


def save(base: Path, model, out: Path, log: dict) -> None:
    """Write ``model``'s weights under the names, with the dtypes and the companions of ``base``."""
    source = CheckpointSource(base)
    state = model.state_dict()
    with CheckpointSink(out, [source.info(name) for name in source.names]) as sink:
        for name in source.names:
            tensor = state.get(name)
            if tensor is None:  # a buffer that transformers computes itself
                tensor = source.tensor(name)
            sink.write(name, tensor.to(source.info(name).dtype))
        copy_companions(source, sink)
        sink.write_text("config.json", json.dumps(source.config, indent=2) + "\n")
        sink.write_text("training.json", json.dumps(log, indent=2) + "\n")

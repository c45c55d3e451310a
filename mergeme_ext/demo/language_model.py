"""A causal language model in transformers: loading, loss, perplexity, continuation."""

import contextlib
import math
import time
from pathlib import Path

import torch
from torch import Tensor

__all__ = [
    "compute_dtype",
    "continuation",
    "load_model",
    "load_tokenizer",
    "next_token_loss",
    "perplexity",
]

SLICE_TOKENS = 512


def _quiet():
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def load_tokenizer(folder: Path):
    """Return the tokenizer in ``folder``."""
    return _quiet().AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_model(folder: Path):
    """Return the checkpoint in ``folder`` as a stock transformers model in float32.

    Raises:
        RuntimeError: A tensor is missing, left over, or of another shape than the model's.
    """
    transformers = _quiet()
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    problems = {kind: sorted(found) for kind, found in report.items() if found}
    if problems:
        raise RuntimeError(f"{folder}: transformers did not take every tensor: {problems}")
    return model.eval()


def compute_dtype() -> torch.dtype:
    """Return the dtype in which this processor multiplies matrices fastest.

    bfloat16 is several times faster than float32 with AMX, and several times slower without it or
    AVX-512 BF16: measured, as no public call of torch tells.
    """

    def seconds(dtype: torch.dtype) -> float:
        x, w = torch.ones(256, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        best = math.inf
        for _ in range(4):
            started = time.perf_counter()
            x @ w
            best = min(best, time.perf_counter() - started)
        return best

    return (
        torch.bfloat16 if 1.5 * seconds(torch.bfloat16) < seconds(torch.float32) else torch.float32
    )


def autocast(dtype: torch.dtype):
    if dtype != torch.bfloat16:
        return contextlib.nullcontext()
    return torch.autocast("cpu", dtype=dtype)


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy behind a frozen head, in slices, so that [tokens, vocabulary] never exists.

    The gradient towards ``hidden`` is formed with the loss: a backward pass of its own would have
    to compute the logits once more.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        # hidden [T, H], head [V, H], targets [T]
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        total = hidden.new_zeros((), dtype=torch.float64)
        for start in range(0, len(targets), SLICE_TOKENS):
            part = slice(start, start + SLICE_TOKENS)
            target = targets[part, None]
            logits = (hidden[part] @ head.T).float()
            log_norm = logits.logsumexp(-1, keepdim=True)
            total += (log_norm - logits.gather(1, target)).sum(dtype=torch.float64)
            if wanted:
                error = logits.sub_(log_norm).exp_()  # softmax minus one-hot
                error.scatter_add_(1, target, error.new_full(target.shape, -1.0))
                gradient[part] = error.to(hidden.dtype) @ head
        ctx.gradient, ctx.count = gradient, len(targets)
        return (total / len(targets)).float()

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        return ctx.gradient * (grad_loss / ctx.count).to(ctx.gradient.dtype), None, None


def next_token_loss(model, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the mean negative log-likelihood of each token of ``rows`` [R, L] after the first.

    Args:
        model: A transformers causal language model whose output head gets no gradient.
        rows: Token ids.
        dtype: Of the matrix products.
    """
    with autocast(dtype):
        hidden = model.base_model(input_ids=rows, use_cache=False)[0][:, :-1].flatten(0, 1)
        head = model.get_output_embeddings().weight
        return _HeadLoss.apply(hidden.to(dtype), head.to(dtype), rows[:, 1:].flatten())


@torch.no_grad()
def perplexity(model, rows: Tensor, dtype: torch.dtype, batch: int = 4) -> float:
    """Return ``exp`` of the mean negative log-likelihood of ``rows`` [R, L] under ``model``."""
    total = sum(
        next_token_loss(model, part, dtype).item() * len(part) for part in rows.split(batch)
    )
    return math.exp(total / len(rows))


@torch.no_grad()
def continuation(
    model, tokenizer, prompt: str, max_new_tokens: int, separator: int, dtype: torch.dtype
) -> str:
    """Return what ``model`` writes after ``prompt``, taking the likeliest token each time.

    It ends at ``separator``, the token between texts, if that comes first.
    """
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    with autocast(dtype):
        ids = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=1.1,
            eos_token_id=separator,
            pad_token_id=tokenizer.pad_token_id or 0,
        )
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

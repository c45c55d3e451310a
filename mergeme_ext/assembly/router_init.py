"""First values of the routers' rows: from prompts, random, or zero."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["GATE_INPUTS", "condition", "mean_inputs", "random_rows", "rows_from_means"]

GATE_INPUTS = ("router", "residual")
POOLS = ("mean", "last")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Prompts:
    """What one expert is for: texts it should get, and texts it should not."""

    positive: Sequence[str]
    negative: Sequence[str] = ()


def random_rows(shape: tuple[int, ...], seed: int, name: str, std: float = 0.02) -> Tensor:
    """Return float32 normal noise that depends on ``seed`` and ``name`` alone.

    Args:
        shape: Of the result.
        seed: Any integer.
        name: Name of the tensor that the noise is for.
        std: Standard deviation.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randn(shape, generator=generator).mul_(std)


def mean_inputs(
    model: Path,
    prompts: Sequence[Prompts],
    *,
    tokenizer: Path,
    gate_input: str = "router",
    pool: str = "mean",
    max_tokens: int = 512,
) -> Tensor:
    """Return the mean state of ``model`` in each layer over each expert's ``prompts``.

    Args:
        model: Folder of a LLaMA- or Mistral-shaped checkpoint, run whole with transformers
            (in float32 up to a billion parameters, else in its own dtype).
        prompts: One per expert, P in number.
        tokenizer: Folder with the tokenizer.
        gate_input: "router": what enters a layer's MLP, which is what a Mixtral router reads;
            "residual": what enters the layer, before its first norm.
        pool: "mean" over a prompt's tokens, or the "last" token's state.
        max_tokens: A longer prompt is cut here.

    Returns:
        [L, P, H] float64: the mean over positive prompts (each counts the same, whatever its
        length) minus the mean over negative ones.

    Raises:
        ImportError: transformers is missing.
        ValueError: There is no tokenizer, or a prompt holds no token.

    Source: the idea is mergekit-moe's, which takes "residual" and "last"; "router" and "mean" are
    ours: a row then lives in the space of the vectors that it will be multiplied with.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "gate_mode hidden: expected transformers 5 to be installed, to run the model on the "
            f"prompts; run: pip install 'mergeme_ext[hf]', or choose gate_mode random ({error})"
        ) from error
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        encode = _load_tokenizer(transformers, tokenizer)
        runner = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype="auto", local_files_only=True
        )
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    if runner.num_parameters() <= 1_000_000_000:
        runner = runner.float()
    return _mean_inputs(runner.eval().model, encode, prompts, gate_input, pool, max_tokens)


def _load_tokenizer(transformers, folder: Path):
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise ValueError(
            f"gate_mode hidden: expected a tokenizer in {folder}, one of {', '.join(TOKENIZERS)}, "
            "got none"
        )
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


@torch.inference_mode()
def _mean_inputs(decoder, encode, prompts, gate_input, pool, max_tokens) -> Tensor:
    states: list[Tensor] = []  # one [H] per layer, of the prompt that runs

    def keep(module, args, kwargs):
        x = (args[0] if args else kwargs["hidden_states"])[0]  # [tokens, H]
        states.append((x[-1] if pool == "last" else x.double().mean(0)).double())

    targets = [layer.mlp if gate_input == "router" else layer for layer in decoder.layers]
    hooks = [target.register_forward_pre_hook(keep, with_kwargs=True) for target in targets]

    def run(text: str) -> Tensor:
        tokens = encode(text, truncation=True, max_length=max_tokens, return_tensors="pt")
        if tokens["input_ids"].numel() == 0:
            raise ValueError(f"gate_mode hidden: expected prompts with text, got {text!r}")
        states.clear()
        decoder(input_ids=tokens["input_ids"], use_cache=False)
        return torch.stack(states)  # [L, H]

    def mean(texts: Sequence[str]) -> Tensor:
        return sum(run(text) for text in texts) / len(texts)

    try:
        rows = [
            mean(p.positive) - mean(p.negative) if p.negative else mean(p.positive) for p in prompts
        ]
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(rows, dim=1)


def rows_from_means(means: Tensor, *, center: bool, scale: float) -> Tensor:
    """Return router rows that point at ``means``.

    Args:
        means: [E, H] float64, an expert's mean router input in one layer.
        center: Subtract the mean over experts first and take out what is left along that mean, so
            that rows hold only what tells experts apart and the average input favours none.
        scale: Length of a row; larger means sharper routing.

    Returns:
        [E, H] float64, each row of length ``scale`` (or zero, where an expert's mean is the
        mean of all).

    Source: without ``center`` and with ``scale`` 1, mergekit-moe's rows; the rest is ours. A
    softmax sees only differences between rows, and means of hidden states have most in common:
    centring before the rows get their length keeps that length for what differs.
    Two SmolLM2-135M experts, medicine and code, both used for every token, 1024 held-out tokens
    of each; geometric mean of the two perplexities: router of zeros 24.01; mergekit-moe's rows
    23.91; "router" and "mean" 23.86; centred as well 23.70; with ``scale`` 2, 4, 8 then 23.64,
    23.59, 23.57.
    """
    rows = means
    if center and len(means) > 1:
        middle = means.mean(0)
        rows = means - middle
        rows = rows - torch.outer(rows @ middle, middle) / middle.square().sum().clamp_min(1e-30)
    length = rows.norm(dim=1, keepdim=True)
    floor = 1e-6 * means.norm(dim=1).max()  # below it, rounding is all that is left
    return torch.where(length > floor, scale * rows / length.clamp_min(1e-30), 0)


def condition(rows: Tensor, *, center: bool) -> float:
    """Return the condition number of router ``rows`` [E, H]: how alike the prompts were.

    Centred rows sum to about zero, so that their smallest singular value says nothing and is
    left out; so is a row of zeros, which an expert without prompts of its own has. Infinite where
    rows coincide, or where fewer than two are left.
    """
    told_apart = rows[rows.any(1)]
    if len(told_apart) < 2:
        return 1.0 if len(rows) == 1 else float("inf")
    rows = told_apart
    values = torch.linalg.svdvals(rows.double())
    if center:
        values = values[:-1]
    return (values[0] / values[-1]).item() if values[-1] > 0 else float("inf")

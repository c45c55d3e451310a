"""Collects what Fisher merging and RegMean need to know of a model: run it on a few examples."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mergeme_ext.io import CheckpointSink

__all__ = ["causal_log_likelihood", "collect_fisher", "collect_grams"]

Example = Mapping[str, Tensor]
LogLikelihood = Callable[[nn.Module, Example], Tensor]

# What torch.nn.functional.cross_entropy, and so every label tensor, leaves out.
_NO_LABEL = -100


def collect_fisher(
    model: nn.Module,
    batches: Iterable[Example],
    out: str | Path,
    *,
    labels: str = "model",
    log_likelihood: LogLikelihood | None = None,
    max_examples: int = 256,
    seed: int = 0,
    overwrite: bool = False,
) -> int:
    """Write the diagonal Fisher information of ``model`` to the folder ``out``.

    It is the mean over examples of the squared gradient of the example's log likelihood, so each
    example has a backward pass of its own: the square of a batch's gradient is something else. It
    takes the memory of the gradients and of the result, beside the model.

    Args:
        model: Gets gradients for every parameter that requires one; no ``grad`` is touched.
        batches: Mappings of tensors ``[B, ...]``; for a causal language model ``input_ids``
            ``[B, S]`` and, where there is padding, ``attention_mask``; ``labels`` may leave out
            tokens as usual (-100).
        out: Target folder, for the ``fisher`` of a recipe.
        labels: Whose labels: drawn from the ``model``'s own distribution, which gives the Fisher
            information, or the ``data``'s, which gives what is called the empirical Fisher.
        log_likelihood: Takes the model and an example (batch size one) and returns a scalar; for
            models other than causal language models. ``labels`` is then up to it.
        max_examples: How many examples to take at most; the paper takes 256.
        seed: Of the drawn labels.
        overwrite: Replace an existing folder of statistics.

    Returns:
        How many examples were taken.

    Raises:
        ValueError: There is no example or no parameter, or a gradient is not finite.
        OSError: The target exists, or the disk has no room.

    Source: Matena & Raffel 2022, arXiv:2111.09832, section 3.
    """
    if labels not in ("model", "data"):
        raise ValueError(f"collect_fisher: expected labels to be model or data, got {labels!r}")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("collect_fisher: expected parameters that require a gradient, got none")
    generator = torch.Generator().manual_seed(seed)
    if log_likelihood is None:

        def log_likelihood(model: nn.Module, example: Example) -> Tensor:
            return causal_log_likelihood(model, example, generator if labels == "model" else None)

    CheckpointSink(out, [], overwrite=overwrite)  # refuses a target before the work is done
    squares = {name: _accumulator(p.shape, p) for name, p in parameters.items()}
    count = 0
    with _evaluating(model), torch.enable_grad():
        for example in _examples(batches, max_examples):
            value = log_likelihood(model, example)
            gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    squares[name] += gradient.to(squares[name].dtype).square_()
            count += 1
    if count == 0:
        raise ValueError("collect_fisher: expected at least one example, got none")
    for name, square in squares.items():
        square /= count
        if not square.isfinite().all():
            raise ValueError(f"collect_fisher: the gradient of {name!r} is not finite")
    _write(out, _as_stored(model, squares), "fisher", count, overwrite)
    return count


def collect_grams(
    model: nn.Module,
    batches: Iterable[Example],
    out: str | Path,
    *,
    max_examples: int = 256,
    overwrite: bool = False,
) -> int:
    """Write the Gram matrices of all linear layers' inputs to the folder ``out``.

    The Gram of a layer is the mean over tokens of x x^T, ``[in, in]``, stored under the name of
    the layer's weight. All of them are held in memory at once. Experts of a Mixture-of-Experts
    see the tokens that are routed to them; one that no token reached gets no Gram, and RegMean
    gives it the mean.

    Args:
        model: Its ``torch.nn.Linear`` layers are looked at, and experts packed as in transformers:
            ``gate_up_proj`` ``[E, 2 I, H]`` and ``down_proj`` ``[E, H, I]``.
        batches: As for ``collect_fisher``; the model is called with each example.
        out: Target folder, for the ``gram`` of a recipe.
        max_examples: How many examples to take at most; the paper takes 256 or more.
        overwrite: Replace an existing folder of statistics.

    Returns:
        How many examples were taken.

    Raises:
        ValueError: There is no example, or no linear layer was reached, or an input is not finite.
        OSError: The target exists, or the disk has no room.

    Source: Jin et al. 2023, arXiv:2212.09849, section 3.
    """
    CheckpointSink(out, [], overwrite=overwrite)  # refuses a target before the work is done
    grams = _Grams()
    handles = grams.watch(model)
    count = 0
    try:
        with _evaluating(model), torch.no_grad():
            for example in _examples(batches, max_examples):
                model(**{key: value for key, value in example.items() if key != "labels"})
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    if count == 0:
        raise ValueError("collect_grams: expected at least one example, got none")
    means = grams.means()
    if not means:
        raise ValueError("collect_grams: expected the model to run torch.nn.Linear layers")
    for name, gram in means.items():
        if not gram.isfinite().all():
            raise ValueError(f"collect_grams: the inputs of {name!r} are not finite")
    _write(out, means, "gram", count, overwrite)
    return count


class _Grams:
    """Sums of x x^T and counts of tokens, by the name of the weight that x goes through."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def watch(self, model: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Let every linear layer and every expert in ``model`` report its inputs."""
        own = dict(model.named_parameters())  # a head tied to the embedding is not among them
        handles = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and f"{name}.weight" in own:
                hook = partial(self._see_layer, f"{name}.weight")
            elif _is_packed(module):
                hook = partial(self._see_experts, _expert_names(model, name, module))
            else:
                continue
            handles.append(module.register_forward_pre_hook(hook))
        return handles

    def means(self) -> dict[str, Tensor]:
        """Return the Grams of all weights that a token went through."""
        return {name: self.sums[name] / n for name, n in self.tokens.items() if n}

    def _add(self, name: str, x: Tensor) -> None:
        if name not in self.sums:
            self.sums[name] = _accumulator((x.shape[1], x.shape[1]), x)
            self.tokens[name] = 0
        x = x.to(self.sums[name].dtype)
        self.sums[name].addmm_(x.t(), x)
        self.tokens[name] += x.shape[0]

    def _see_layer(self, name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._add(name, args[0].reshape(-1, args[0].shape[-1]))

    def _see_experts(
        self, names: list[tuple[list[str], list[str]]], experts: nn.Module, args: tuple[Tensor, ...]
    ) -> None:
        hidden, topk_ids = args[:2]
        for expert, (gate_up_names, down_names) in enumerate(names):
            x = hidden[(topk_ids == expert).any(-1)]
            if not len(x):
                continue
            gate, up = nn.functional.linear(x, experts.gate_up_proj[expert]).chunk(2, dim=-1)
            for name in gate_up_names:
                self._add(name, x)
            for name in down_names:
                self._add(name, experts.act_fn(gate) * up)


def _is_packed(module: nn.Module) -> bool:
    """Whether ``module`` holds experts in the layout that ``collect_grams`` describes."""
    weights = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    if not all(isinstance(w, nn.Parameter) and w.dim() == 3 for w in weights):
        return False
    gate_up, down = weights
    return (
        gate_up.shape == (down.shape[0], 2 * down.shape[2], down.shape[1])
        and len(list(module.parameters(recurse=False))) == 2  # no biases
        and callable(getattr(module, "act_fn", None))
    )


def _expert_names(
    model: nn.Module, name: str, module: nn.Module
) -> list[tuple[list[str], list[str]]]:
    """Return, for each expert, what its weights before and behind the activation are stored as."""
    names: list[tuple[list[str], list[str]]] = [([], []) for _ in module.down_proj]
    numbers = torch.arange(len(names))[:, None, None]
    for place, (weight, rows) in enumerate((("gate_up_proj", 2), ("down_proj", 1))):
        packed = {f"{name}.{weight}": numbers.expand(-1, rows, 1).clone()}
        for stored, number in _as_stored(model, packed).items():
            if number.numel() <= rows:  # it is stored expert by expert
                names[int(number.flatten()[0])][place].append(stored)
    return names


def causal_log_likelihood(
    model: nn.Module, example: Example, generator: torch.Generator | None = None
) -> Tensor:
    """Return the log likelihood of one example under a causal language model, summed over tokens.

    Args:
        model: Returns ``logits`` ``[1, S, V]`` for ``input_ids`` ``[1, S]``.
        example: ``input_ids``, and ``labels`` if some tokens are not to be predicted (-100).
        generator: If given, the labels are drawn from the model's distribution instead.
    """
    inputs = {key: value for key, value in example.items() if key != "labels"}
    logits = model(**inputs).logits[0, :-1]
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    targets = example.get("labels", example["input_ids"])[0, 1:]
    asked = targets != _NO_LABEL
    logs, targets = logs[asked], targets[asked]
    if generator is not None and len(logs):
        drawn = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator)
        targets = drawn[:, 0].to(logs.device)
    return logs.gather(1, targets[:, None]).sum()


def _accumulator(shape: Iterable[int], like: Tensor) -> Tensor:
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.zeros(*shape, dtype=wide, device=like.device)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch off dropout and the like; each module gets its mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _examples(batches: Iterable[Example], most: int) -> Iterator[dict[str, Tensor]]:
    """Yield examples of batch size one, without the padding that ``attention_mask`` marks."""
    count = 0
    for batch in batches:
        for row in range(len(next(iter(batch.values())))):
            if count == most:
                return
            example = {key: value[row : row + 1] for key, value in batch.items()}
            mask = example.pop("attention_mask", None)
            if mask is not None:
                kept = mask[0].bool()
                example = {
                    key: value[:, kept] if value.shape[:2] == mask.shape else value
                    for key, value in example.items()
                }
            yield example
            count += 1


def _as_stored(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name and cut tensors as the model's checkpoint does: transformers may pack weights."""
    if not hasattr(model, "save_pretrained"):
        return tensors
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors)


def _write(
    out: str | Path, tensors: Mapping[str, Tensor], kind: str, count: int, overwrite: bool
) -> None:
    planned = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    about = {"statistics": kind, "examples": str(count)}
    with CheckpointSink(out, planned, metadata=about, overwrite=overwrite) as sink:
        for name, tensor in tensors.items():
            sink.write(name, tensor)

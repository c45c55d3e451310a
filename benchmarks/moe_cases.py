"""Shapes of Mixture-of-Experts layers, their weights and routing, and what they must compute."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "BOUNDS",
    "ROUTINGS",
    "SHAPES",
    "Case",
    "Expected",
    "Inputs",
    "Shape",
    "Weights",
    "checked_expert",
    "make_inputs",
    "make_weights",
    "reference",
    "sample_of",
    "some_rows",
    "training_reference",
    "work",
]


@dataclass(frozen=True)
class Shape:
    """One MoE layer: E experts, each of 3 * H * I weights, K of them per token."""

    experts: int
    hidden: int
    intermediate: int
    top_k: int
    source: str

    @property
    def weights(self) -> int:
        return 3 * self.experts * self.hidden * self.intermediate


SHAPES = {
    "smoke": Shape(4, 64, 32, 2, "the tests"),
    "fine": Shape(64, 1024, 512, 8, "fine-grained experts, as in the design notes"),
    "olmoe": Shape(64, 2048, 1024, 8, "allenai/OLMoE-1B-7B-0924"),
    "mixtral": Shape(8, 4096, 14336, 2, "mistralai/Mixtral-8x7B-v0.1"),
    "qwen3": Shape(128, 2048, 768, 8, "Qwen/Qwen3-30B-A3B"),
    "deepseek": Shape(64, 2048, 1408, 6, "deepseek-ai/DeepSeek-V2-Lite, its routed experts"),
}
ROUTINGS = ("balanced", "skewed")

# Relative error, by norm, up to which a contender computes the layer. A half type may be rounded
# at about ten places on the way (gate, up, activation, product, weight, sums over K), by up to a
# unit in the last place where a contender cuts instead of rounding: sqrt(10 / 3) units, doubled.
# float32 is summed in any order: the root of the longest sum instead.
BOUNDS = {
    "bfloat16": 2 * math.sqrt(10 / 3) * 2**-8,
    "float16": 2 * math.sqrt(10 / 3) * 2**-11,
    "float32": 2 * math.sqrt(14336) * 2**-24,
}

# Values that all weights are cut from; its odd length keeps rows from lining up.
POOL = (1 << 22) + 7


@dataclass(frozen=True)
class Case:
    """One row of work: everything but who does it."""

    shape: str
    dtype: str
    threads: int
    mode: str
    routing: str
    tokens: int

    def __str__(self) -> str:
        return (
            f"{self.shape} {self.dtype} {self.mode}, {self.routing}, "
            f"{self.tokens} tokens, {self.threads} threads"
        )


@dataclass(frozen=True)
class Weights:
    gate_up: Tensor  # [E, 2I, H], gate rows first
    down: Tensor  # [E, H, I]


@dataclass(frozen=True)
class Inputs:
    x: Tensor  # [T, H]
    topk_ids: Tensor  # int64 [T, K]
    topk_weights: Tensor  # float32 [T, K]
    grad: Tensor  # [T, H], of the output


@dataclass(frozen=True)
class Expected:
    value: Tensor  # float64
    scale: float  # that errors, by norm, are relative to


def make_weights(shape: Shape, dtype: torch.dtype) -> Weights:
    """The same weights in every process, at the speed of a copy."""
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0))

    def fill(*sizes: int) -> Tensor:
        values = (pool * sizes[-1] ** -0.5).to(dtype)
        out = torch.empty(sizes, dtype=dtype)
        for number, part in enumerate(out.view(-1).split(POOL)):
            # Another start each time, so that no two experts are alike.
            part.copy_(values.roll(number * 9973)[: part.numel()])
        return out

    return Weights(
        fill(shape.experts, 2 * shape.intermediate, shape.hidden),
        fill(shape.experts, shape.hidden, shape.intermediate),
    )


def make_inputs(shape: Shape, dtype: torch.dtype, routing: str, tokens: int) -> Inputs:
    """Tokens and their experts.

    "balanced" draws each token's K experts with equal chances; "skewed" with chances that fall as
    one over the rank of the expert, in a fixed random order of experts.
    """
    g = torch.Generator().manual_seed(1000 + tokens)
    x = torch.randn(tokens, shape.hidden, generator=g).to(dtype)
    grad = torch.randn(tokens, shape.hidden, generator=g).to(dtype)
    chances = torch.ones(shape.experts)
    if routing == "skewed":
        order = torch.randperm(shape.experts, generator=torch.Generator().manual_seed(7))
        chances[order] = 1 / torch.arange(1, shape.experts + 1)
    ids = torch.multinomial(chances.expand(tokens, -1), shape.top_k, generator=g)
    scores = torch.rand(tokens, shape.top_k, generator=g) + 0.1
    return Inputs(x, ids, scores / scores.sum(-1, keepdim=True), grad)


def work(shape: Shape, dtype: torch.dtype, inputs: Inputs, mode: str) -> tuple[int, int]:
    """Bytes of weights that must cross the memory bus, and operations, at least.

    Training reads the weights of the experts in use twice and writes all weights' gradients once;
    it multiplies three times as much.
    """
    per_expert = 3 * shape.hidden * shape.intermediate
    in_use = inputs.topk_ids.unique().numel()
    size = torch.finfo(dtype).bits // 8
    flops = 2 * inputs.topk_ids.numel() * per_expert
    if mode == "forward":
        return in_use * per_expert * size, flops
    return (2 * in_use + shape.experts) * per_expert * size, 3 * flops


def sample_of(tokens: int, most: int = 16) -> Tensor:
    """Tokens that are checked: some of all, evenly spread, the last among them."""
    return torch.linspace(0, tokens - 1, min(tokens, most)).round().long().unique()


def _layer(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ down.T


def reference(weights: Weights, inputs: Inputs, sample: Tensor) -> list[Expected]:
    """The layer's output for the tokens of ``sample`` in float64, expert by expert."""
    x = inputs.x[sample].double()
    ids, mix = inputs.topk_ids[sample], inputs.topk_weights[sample].double()
    out = torch.zeros_like(x)
    for e in ids.unique().tolist():
        token, k = (ids == e).nonzero(as_tuple=True)
        y = _layer(x[token], weights.gate_up[e].double(), weights.down[e].double())
        out.index_add_(0, token, y * mix[token, k, None])
    return [Expected(out, float(out.norm()))]


def training_reference(weights: Weights, inputs: Inputs, sample: Tensor) -> list[Expected]:
    """Gradients in float64: of the sample's tokens, of some rows of one expert, of the mixing.

    The expert is ``checked_expert``'s.
    """
    x = inputs.x[sample].double().requires_grad_()
    ids = inputs.topk_ids[sample]
    mix = inputs.topk_weights[sample].double().requires_grad_()
    grad = inputs.grad[sample].double()
    out = torch.zeros(x.shape, dtype=torch.float64)
    products = 0.0
    for e in ids.unique().tolist():
        token, k = (ids == e).nonzero(as_tuple=True)
        y = _layer(x[token], weights.gate_up[e].double(), weights.down[e].double())
        products += float((y.detach() * grad[token]).square().sum())
        out = out.index_add(0, token, y * mix[token, k, None])
    grad_x, grad_mix = torch.autograd.grad(out, (x, mix), grad)
    e = checked_expert(inputs)
    token, k = (inputs.topk_ids == e).nonzero(as_tuple=True)
    gate_up = weights.gate_up[e].double().requires_grad_()
    down = weights.down[e].double().requires_grad_()
    y = _layer(inputs.x[token].double(), gate_up, down)
    y = y * inputs.topk_weights[token, k, None].double()
    grads = torch.autograd.grad(y, (gate_up, down), inputs.grad[token].double())
    parts = (grad_x, *map(some_rows, grads))
    found = [Expected(part, float(part.norm())) for part in parts]
    # A mixing weight's gradient is an inner product, in which terms cancel: few of them may come
    # out much smaller than their terms, whose roundings remain.
    return [*found, Expected(grad_mix, max(float(grad_mix.norm()), products**0.5))]


def some_rows(grad: Tensor, most: int = 64) -> Tensor:
    """Rows of a weight's gradient that are checked, evenly spread; a copy."""
    return grad[:: -(-grad.shape[0] // most)].clone()


def checked_expert(inputs: Inputs) -> int:
    """The expert in use with the fewest tokens."""
    ids, counts = inputs.topk_ids.unique(return_counts=True)
    return int(ids[counts.argmin()])

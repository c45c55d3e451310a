"""Rows of tokens sorted by expert, and back: gather before, weighted sum after the experts."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["combine_slots", "gather_slots"]


def gather_slots(x: Tensor, permutation: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """Return the token of every slot of ``x``, sorted by expert.

    Args:
        x: Tokens [T, H].
        permutation: int32 [T * K] from ``sort_by_expert``: sorted position to slot.
        inverse: int32 [T * K]: slot to sorted position.
        top_k: K.

    Returns:
        [T * K, H], new, dtype of ``x``.

    Gradient: ``x``; the sum over a token's slots is formed in float32 (float64 for float64).
    Indexing alone would add them up in the half type.
    """
    return _Gather.apply(x, permutation, inverse, top_k)


def combine_slots(
    rows: Tensor, topk_weights: Tensor, permutation: Tensor, inverse: Tensor
) -> Tensor:
    """Return, for each token, the sum of its ``rows`` times ``topk_weights``.

    Args:
        rows: [T * K, H], sorted by expert.
        topk_weights: [T, K], float32 (float64 for float64 ``rows``).
        permutation: int32 [T * K] from ``sort_by_expert``: sorted position to slot.
        inverse: int32 [T * K]: slot to sorted position.

    Returns:
        [T, H], new, dtype of ``rows``; summed over k in order in the dtype of ``topk_weights`` and
        rounded once.

    Gradient: ``rows`` and ``topk_weights``.
    """
    return _Combine.apply(rows, topk_weights, permutation, inverse)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, permutation: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        return x[permutation // max(top_k, 1)]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, _, inverse, ctx.top_k = inputs
        ctx.save_for_backward(inverse)
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        num_tokens, hidden_size = ctx.shape
        by_slot = grad[inverse].view(num_tokens, ctx.top_k, hidden_size)
        acc = torch.float64 if grad.dtype == torch.float64 else torch.float32
        return by_slot.sum(1, dtype=acc).to(grad.dtype), None, None, None


class _Combine(torch.autograd.Function):
    """Keeps ``rows`` as they are: weighted copies in float32 would be the largest thing saved."""

    @staticmethod
    def forward(rows: Tensor, topk_weights: Tensor, permutation: Tensor, inverse: Tensor) -> Tensor:
        num_tokens, top_k = topk_weights.shape
        slots = inverse.view(num_tokens, top_k)
        out = topk_weights.new_zeros(num_tokens, rows.shape[1])
        for k in range(top_k):
            out += rows[slots[:, k]] * topk_weights[:, k, None]
        return out.to(rows.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, topk_weights, permutation, inverse = ctx.saved_tensors
        num_tokens, top_k = topk_weights.shape
        grad_rows = grad_weights = None
        if ctx.needs_input_grad[0]:
            by_row = topk_weights.reshape(-1)[permutation, None]
            grad_rows = (grad[permutation // max(top_k, 1)] * by_row).to(rows.dtype)
        if ctx.needs_input_grad[1]:
            slots, wide = inverse.view(num_tokens, top_k), grad.to(topk_weights.dtype)
            grad_weights = torch.empty_like(topk_weights)
            for k in range(top_k):
                grad_weights[:, k] = (rows[slots[:, k]] * wide).sum(-1)
        return grad_rows, grad_weights, None, None

"""Rows of tokens to other ranks and back, with gradients."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Plan", "exchange", "exchange_rows", "rows_to_tokens", "tokens_to_rows"]


class Plan(NamedTuple):
    """How many rows go to each rank and come from it."""

    send: list[int]
    receive: list[int]
    group: dist.ProcessGroup | None

    def back(self) -> "Plan":
        """Return the plan that takes the rows back to where they came from."""
        return Plan(self.receive, self.send, self.group)


def exchange(rows: Tensor, plan: Plan) -> Tensor:
    """Return the rows that other ranks send here, in the ranks' order; no gradient."""
    out = rows.new_empty(sum(plan.receive), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), plan.receive, plan.send, group=plan.group)
    return out


def exchange_rows(plan: Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return, for each of ``tensors``, the rows that other ranks send here; with gradients."""
    return _Exchange.apply(plan, *tensors)


def tokens_to_rows(x: Tensor, slots: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """Return the tokens of ``x`` sorted by expert, a row for each choice that was not dropped.

    Args:
        x: [T, H].
        slots: int32 [R], R <= T * K: the start of ``sort_by_expert``'s permutation.
        inverse: int32 [T * K], whole.
        top_k: K.

    Returns:
        [R, H], new.
    """
    return _ToRows.apply(x, slots, inverse, top_k)


def rows_to_tokens(rows: Tensor, slots: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """Return, for each token, the sum of its ``rows``; see ``tokens_to_rows``.

    Returns:
        [T, H], new, dtype of ``rows``; summed over k in order in float32 (float64 for float64) and
        rounded once.
    """
    return _ToTokens.apply(rows, slots, inverse, top_k)


class _Exchange(torch.autograd.Function):
    """All-to-all of several tensors' rows.

    One function for all, so that every rank runs the collectives of backward in the same order.
    """

    @staticmethod
    def forward(ctx, plan: Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.plan = plan
        return tuple(exchange(t, plan) for t in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        back = ctx.plan.back()
        need = ctx.needs_input_grad[1:]
        return None, *(exchange(g, back) if n else None for g, n in zip(grads, need, strict=True))


def _gather_rows(tokens: Tensor, slots: Tensor, top_k: int) -> Tensor:
    return tokens[slots // max(top_k, 1)]


def _sum_rows(rows: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """Sum over k in order of each token's rows; a slot that was dropped has none."""
    acc = torch.float64 if rows.dtype == torch.float64 else torch.float32
    num_tokens = len(inverse) // top_k if top_k else 0
    total = rows.new_zeros(num_tokens, rows.shape[1], dtype=acc)
    places = inverse.view(num_tokens, top_k)
    dropped = len(rows) < len(inverse)
    for k in range(top_k):
        place = places[:, k]
        if dropped:
            kept = (place < len(rows)).nonzero().squeeze(1)
            total[kept] += rows[place[kept]]
        else:
            total += rows[place]
    return total.to(rows.dtype)


class _ToRows(torch.autograd.Function):
    """Tokens to rows sorted by expert: row r is the token of slot ``slots[r]``."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.shape, ctx.top_k = x.shape, top_k
        return _gather_rows(x, slots, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        grad_x = _sum_rows(grad, inverse, ctx.top_k).view(ctx.shape)
        return grad_x, None, None, None


class _ToTokens(torch.autograd.Function):
    """Rows to tokens, each the sum of its rows over k in order: the transpose of _ToRows."""

    @staticmethod
    def forward(ctx, rows: Tensor, slots: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.top_k = top_k
        return _sum_rows(rows, inverse, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (slots,) = ctx.saved_tensors
        return _gather_rows(grad, slots, ctx.top_k), None, None, None

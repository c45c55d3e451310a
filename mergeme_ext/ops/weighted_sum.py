"""Weighted sum of checkpoints: the model soup, in one pass over all of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["weighted_sum"]


def weighted_sum(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return the sum over m of ``weights[m] * tensors[m]``.

    Args:
        tensors: M >= 1 tensors of one shape, dtype (float16, bfloat16, float32 or float64) and
            device.
        weights: float64 ``[M]``, dimensionless.

    Returns:
        A new contiguous tensor with the shape and dtype of ``tensors[0]``. Terms are added in
        index order in float32 (float64 for float64 inputs) and rounded once.

    Raises:
        TypeError: A dtype is not the documented one.
        ValueError: A shape or device does not match, or ``tensors`` is empty.

    Source: model soups, Wortsman et al. 2022, arXiv:2203.05482.
    """
    return torch.ops.mergeme.weighted_sum.default(tensors, weights)


def _fake(tensors, weights):
    return torch.empty_like(tensors[0], memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    tensors, weights = inputs
    ctx.save_for_backward(weights, *tensors)


def register(namespace: str) -> None:
    """Register fake and backward of this op in ``namespace``."""

    def backward(ctx, grad):
        weights, *tensors = ctx.saved_tensors
        op = getattr(torch.ops, namespace).weighted_sum.default
        for_tensors = [op([grad], weights[m : m + 1]) for m in range(len(tensors))]
        for_weights = None
        if ctx.needs_input_grad[1]:
            for_weights = torch.stack([(grad.double() * t.double()).sum() for t in tensors])
        return for_tensors, for_weights

    name = f"{namespace}::weighted_sum"
    torch.library.register_fake(name, _fake)
    torch.library.register_autograd(name, backward, setup_context=_setup_context)


register("mergeme")

"""Dropping by rank: keep probabilities that grow with the magnitude's rank in its row."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["drop_by_rank"]


def drop_by_rank(
    base: Tensor,
    tensors: Sequence[Tensor],
    selection: Tensor,
    *,
    key: int = 0,
    offset: int = 0,
    inverse_prob: bool = False,
) -> Tensor:
    """Return the task vectors of ``tensors``, thinned at random by the ranks of their magnitudes.

    In every row of x = tensors[m] - base, of n elements, the element of rank r (0 the smallest
    magnitude, n - 1 the largest) is kept with probability q = low + (high - low) * r / (n - 1),
    where (low, high) is ``selection[m]``; a row of one element with their mean. Of equal magnitudes
    the lower index ranks higher; a NaN ranks above infinity.

    Args:
        base: Pretrained weight, any shape; rows are its last dimension, of fewer than 2^32
            elements. float16, bfloat16, float32 or float64.
        tensors: M >= 1 fine-tuned weights, each with the shape, dtype and device of ``base``.
        selection: float64 ``[M, 2]``, keep probabilities in [0, 1] of the smallest and of the
            largest magnitude of a row.
        key: 64-bit key of the random bits. Element i of model m has the 16 bits it has in
            ``merge_task_vectors``, and is kept if they are below q * 65536, rounded.
        offset: Flat index in the whole tensor of the first element given here, so that a tensor
            given in chunks of whole rows has the bits of one given whole.
        inverse_prob: Whether to divide what is kept by its q, so that x is the expectation.

    Returns:
        ``[M, *base.shape]``, new and contiguous, float32 (float64 for float64 inputs): what is kept
        of each x, and 0 for what is dropped, a NaN too. Threads, chunks and devices do not change
        a bit.

    Raises:
        TypeError: A dtype is not the documented one.
        ValueError: A shape, device, row length or offset does not match, or (CPU; on CUDA the
            kernel asserts) a probability is outside [0, 1].

    Gradient:
        None; backward raises ``NotImplementedError``.

    Source: MagPrune of DELLA, Deep et al. 2024, arXiv:2406.11617, section 3.1.
    """
    return torch.ops.mergeme.drop_by_rank.default(
        base, tensors, selection, key=key, offset=offset, inverse_prob=inverse_prob
    )


def _fake(base, tensors, selection, *, key, offset, inverse_prob):
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    return base.new_empty((len(tensors), *base.shape), dtype=dtype)


def _backward(ctx, grad):
    raise NotImplementedError("mergeme::drop_by_rank has no gradient")


def register(namespace: str) -> None:
    """Register fake and backward of this op in ``namespace``."""
    name = f"{namespace}::drop_by_rank"
    torch.library.register_fake(name, _fake)
    torch.library.register_autograd(name, _backward)


register("mergeme")

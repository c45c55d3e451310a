"""Norms of task vectors before and after a mask, for rescaling what a mask left."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["masked_norms"]


def masked_norms(
    base: Tensor,
    tensors: Sequence[Tensor],
    selection: Tensor,
    *,
    mask: str = "all",
    key: int = 0,
) -> Tensor:
    """Return norms of each x = tensors[m] - ``base``, whole and masked by ``selection``.

    Args:
        base: Pretrained weight, any shape; float16, bfloat16, float32 or float64.
        tensors: M >= 1 fine-tuned weights, each with the shape, dtype and device of ``base``.
        selection: float64 ``[M, 2]``, or ``[M, 4]`` with ``mask="band"``, as for
            ``merge_task_vectors``.
        mask: "all", "magnitude", "random" or "band", as for ``merge_task_vectors``.
        key: 64-bit key of the random mask.

    Returns:
        float64 ``[M, 6]``, new and contiguous: l1, l2 and largest magnitude of x, then the same of
        the masked x. Differences are formed in float32 (float64 for float64 inputs) and summed in
        float64, in blocks of 4096 elements taken in index order; the order within a block is fixed
        too, so that threads and devices do not change a bit. A kept NaN makes the norms NaN.

    Raises:
        TypeError: A dtype is not the documented one.
        ValueError: A shape, device or name does not match, or (CPU; on CUDA the kernel asserts) a
            keep probability is outside [0, 1].

    Gradient:
        None; backward raises ``NotImplementedError``.

    Source: norm matching after dropping, as merge tools do it in place of the division by the keep
    probability of DARE, Yu et al. 2024, arXiv:2311.03099.
    """
    return torch.ops.mergeme.masked_norms.default(base, tensors, selection, mask=mask, key=key)


def _fake(base, tensors, selection, *, mask, key):
    return base.new_empty((len(tensors), 6), dtype=torch.float64)


def _backward(ctx, grad):
    raise NotImplementedError("mergeme::masked_norms has no gradient")


def register(namespace: str) -> None:
    """Register fake and backward of this op in ``namespace``."""
    name = f"{namespace}::masked_norms"
    torch.library.register_fake(name, _fake)
    torch.library.register_autograd(name, _backward)


register("mergeme")

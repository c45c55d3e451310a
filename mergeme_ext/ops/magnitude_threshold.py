"""Exact magnitude thresholds of task vectors: which elements a trim keeps."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["magnitude_threshold"]


def magnitude_threshold(base: Tensor, tensors: Sequence[Tensor], keep: Sequence[int]) -> Tensor:
    """Return, for each of ``tensors``, the cut that keeps its ``keep`` largest changes of ``base``.

    The cut of model m is a row (threshold, tie_end): element i of x = tensors[m] - base is kept
    if ``|x| > threshold``, or if ``|x| == threshold`` and ``i < tie_end`` (flat, row-major). That
    keeps exactly ``keep[m]`` elements, among equal magnitudes those of lower index.

    Args:
        base: Pretrained weight, any shape, with N elements; float16, bfloat16, float32 or float64.
        tensors: M >= 1 fine-tuned weights, each with the shape, dtype and device of ``base``.
        keep: M counts, each in [0, N].

    Returns:
        float64 ``[M, 2]``, new and contiguous, on the device of ``base``: the ``selection`` that
        ``merge_task_vectors`` and ``masked_norms`` take with ``mask="magnitude"``. Differences are
        formed in float32 (float64 for float64 inputs); thresholds are exact. A NaN counts as
        larger than infinity and is always kept, even where that makes more than ``keep[m]``. A
        cut that keeps nothing else is (infinity, 0).

    Raises:
        TypeError: A dtype is not the documented one.
        ValueError: A shape, device, or number of counts does not match, or a count is out of range.

    Gradient:
        None; backward raises ``NotImplementedError``.

    Source: the trim of TIES, Yadav et al. 2023, arXiv:2306.01708, section 4.1, with an exact count.
    """
    return torch.ops.mergeme.magnitude_threshold.default(base, tensors, keep)


def _fake(base, tensors, keep):
    return base.new_empty((len(tensors), 2), dtype=torch.float64)


def _backward(ctx, grad):
    raise NotImplementedError("mergeme::magnitude_threshold has no gradient")


def register(namespace: str) -> None:
    """Register fake and backward of this op in ``namespace``."""
    name = f"{namespace}::magnitude_threshold"
    torch.library.register_fake(name, _fake)
    torch.library.register_autograd(name, _backward)


register("mergeme")

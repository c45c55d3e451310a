"""The merge itself: mask, weigh, elect signs, combine and add M task vectors in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["merge_task_vectors"]


def merge_task_vectors(
    base: Tensor,
    tensors: Sequence[Tensor],
    weights: Tensor,
    scales: Tensor,
    selection: Tensor,
    *,
    mask: str = "all",
    key: int = 0,
    offset: int = 0,
    elect: str = "none",
    normalize: bool = False,
    lam: float = 1.0,
) -> Tensor:
    """Return ``base`` plus ``lam`` times the merged task vectors of ``tensors``.

    With x = tensors[m] - base, zeroed where the mask drops it, v_m = (weights[m] * scales[m]) * x.
    Without election the mix is the sum of all v_m; with it, the sum of those v_m whose sign is the
    elected one. ``normalize`` divides the mix by the sum of ``weights`` of the same models (1 where
    that is zero; without election 1 where it is below 1e-8). The result is base + lam * mix.

    Args:
        base: Pretrained weight, any shape; float16, bfloat16, float32 or float64.
        tensors: M >= 1 fine-tuned weights, each with the shape, dtype and device of ``base``.
        weights: float64 ``[M]``, dimensionless mixing weights; negative ones flip the sign.
        scales: float64 ``[M]``, dimensionless factors that rescale what a mask left.
        selection: float64 ``[M, 2]``. With ``mask="magnitude"``, the cuts that
            ``magnitude_threshold`` returns; with ``mask="random"``, column 0 is the keep
            probability in [0, 1], rounded to a multiple of 2^-16; with ``mask="band"``, ``[M, 4]``,
            two such cuts side by side; else unused.
        mask: "all" keeps every element; "magnitude" trims by magnitude; "random" keeps an element
            if its 16 random bits are below the probability times 65536; "band" keeps what the first
            cut keeps and the second does not, and NaN.
        key: 64-bit key of the random mask. The bits of element i of model m are a function of
            (key, i, m) only: Philox4x32-10 with counter (i / 8 low, i / 8 high, m, 0), whose four
            words give eight numbers, low halves first.
        offset: Flat index in the whole tensor of the first element given here, so that a tensor
            merged in chunks has the bits of one merged whole. Only masks look at it.
        elect: "none"; "sum" elects the sign of the sum of v_m; "count" that of the sum of signs;
            "unweighted" that of the sum of x. Ties and zero totals elect +. An element that is zero
            never agrees.
        normalize: Whether to divide by the sum of weights.
        lam: Dimensionless factor on the mix (the papers' lambda).

    Returns:
        A new contiguous tensor with ``base``'s shape and dtype. Sums are formed in index order in
        float32 (float64 for float64 inputs) and rounded once; for the election by sum, positive
        and negative values are summed apart and compared. A kept NaN gives NaN; a dropped one
        counts as zero. Threads, chunks and devices do not change a bit.

    Raises:
        TypeError: A dtype is not the documented one.
        ValueError: A shape, device, name or offset does not match, or (CPU; on CUDA the kernel
            asserts) a keep probability is outside [0, 1].

    Gradient:
        None; backward raises ``NotImplementedError``.

    Source: TIES, Yadav et al. 2023, arXiv:2306.01708; DARE, Yu et al. 2024, arXiv:2311.03099; task
    arithmetic, Ilharco et al. 2023, arXiv:2212.04089. Weighted means generalise TIES's plain mean;
    a zero total elects + where its authors' code takes the majority sign of the whole model.
    """
    return torch.ops.mergeme.merge_task_vectors.default(
        base,
        tensors,
        weights,
        scales,
        selection,
        mask=mask,
        key=key,
        offset=offset,
        elect=elect,
        normalize=normalize,
        lam=lam,
    )


def _fake(base, tensors, weights, scales, selection, *, mask, key, offset, elect, normalize, lam):
    return torch.empty_like(base, memory_format=torch.contiguous_format)


def _backward(ctx, grad):
    raise NotImplementedError("mergeme::merge_task_vectors has no gradient")


def register(namespace: str) -> None:
    """Register fake and backward of this op in ``namespace``."""
    name = f"{namespace}::merge_task_vectors"
    torch.library.register_fake(name, _fake)
    torch.library.register_autograd(name, _backward)


register("mergeme")

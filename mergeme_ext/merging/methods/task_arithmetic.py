"""Task arithmetic: the base plus the weighted sum of all task vectors."""

from collections.abc import Sequence

from torch import Tensor

from mergeme_ext.merging.parameters import Lambda, Normalize, Weights
from mergeme_ext.merging.registry import Combine, Scope, merge_method
from mergeme_ext.merging.sparsify import keep_all


@merge_method("task_arithmetic", paper="Ilharco et al. 2023, arXiv:2212.04089", scope=Scope.ELEMENT)
def task_arithmetic(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    weights: Weights,
    normalize: Normalize = False,
    lam: Lambda = 1.0,
) -> Combine:
    """Merge ``base + lam * sum_i weights[i] * (tensors[i] - base)``.

    Args:
        base: Pretrained weight, any shape.
        tensors: M tuned weights, each shaped like ``base``.
        weights: M mixing weights; a negative one takes a skill away.
        normalize: Divide the sum by the sum of ``weights``.
        lam: Factor on the merged task vector (the paper's lambda).
    """
    thinning = keep_all(base, len(tensors))
    return thinning.combine(weights, elect="none", normalize=normalize, lam=lam)

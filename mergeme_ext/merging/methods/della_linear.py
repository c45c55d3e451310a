"""DELLA without its election: drop by the rank of magnitudes, rescale, and add up."""

from collections.abc import Sequence

from torch import Tensor

from mergeme_ext.merging.parameters import (
    Density,
    Lambda,
    Normalize,
    RankWindow,
    Rescale,
    Seed,
    Weights,
)
from mergeme_ext.merging.registry import Combine, Scope, merge_method
from mergeme_ext.merging.sparsify import keep_by_rank, mask_key


@merge_method(
    "della_linear", paper="Deep et al. 2024, arXiv:2406.11617", scope=Scope.TENSOR, whole_rows=True
)
def della_linear(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    weights: Weights,
    density: Density = 1.0,
    epsilon: RankWindow = 0.15,
    normalize: Normalize = False,
    lam: Lambda = 1.0,
    rescale: Rescale = "l1",
    seed: Seed = 0,
    tensor_name: str = "",
) -> Combine:
    """Drop at random, small magnitudes more likely; rescale; sum.

    Arguments are those of ``della``; ``normalize`` divides by the sum of all ``weights``.
    """
    key = mask_key(seed, tensor_name)
    thinning = keep_by_rank(base, tensors, density, epsilon, rescale, key)
    return thinning.combine(weights, elect="none", normalize=normalize, lam=lam)

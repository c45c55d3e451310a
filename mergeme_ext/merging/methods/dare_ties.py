"""DARE with the election of TIES: drop at random, rescale, sum what agrees in sign."""

from collections.abc import Sequence

from torch import Tensor

from mergeme_ext.merging.parameters import (
    Density,
    Elect,
    Lambda,
    Normalize,
    Rescale,
    Seed,
    Weights,
)
from mergeme_ext.merging.registry import Combine, Scope, merge_method
from mergeme_ext.merging.sparsify import keep_random, mask_key


@merge_method("dare_ties", paper="Yu et al. 2024, arXiv:2311.03099", scope=Scope.TENSOR)
def dare_ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    weights: Weights,
    density: Density = 1.0,
    normalize: Normalize = False,
    lam: Lambda = 1.0,
    rescale: Rescale = "l1",
    elect: Elect = "sum",
    seed: Seed = 0,
    tensor_name: str = "",
) -> Combine:
    """Drop at random, rescale, elect a sign per element as TIES does, sum what agrees.

    Arguments are those of ``dare_linear``, and ``elect`` as in ``ties``; ``normalize`` divides by
    the sum of the agreeing ``weights``.
    """
    key = mask_key(seed, tensor_name)
    thinning = keep_random(base, tensors, density, rescale, key)
    return thinning.combine(weights, elect=elect, normalize=normalize, lam=lam)

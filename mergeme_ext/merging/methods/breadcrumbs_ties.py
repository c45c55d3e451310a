"""Breadcrumbs with the election of TIES: keep a band of magnitudes, merge what agrees in sign."""

from collections.abc import Sequence

from torch import Tensor

from mergeme_ext.merging.parameters import (
    Density,
    Elect,
    Gamma,
    Lambda,
    Normalize,
    Rescale,
    Weights,
)
from mergeme_ext.merging.registry import Combine, Scope, merge_method
from mergeme_ext.merging.sparsify import keep_band


@merge_method(
    "breadcrumbs_ties", paper="Davari and Belilovsky 2023, arXiv:2312.06795", scope=Scope.TENSOR
)
def breadcrumbs_ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    weights: Weights,
    density: Density = 1.0,
    gamma: Gamma = 0.01,
    normalize: Normalize = False,
    lam: Lambda = 1.0,
    rescale: Rescale = "none",
    elect: Elect = "sum",
) -> Combine:
    """Keep a band of magnitudes, elect a sign per element as TIES does, sum what agrees.

    Arguments are those of ``breadcrumbs``, and ``elect`` as in ``ties``; ``normalize`` divides by
    the sum of the agreeing ``weights``.
    """
    thinning = keep_band(base, tensors, density, gamma, rescale)
    return thinning.combine(weights, elect=elect, normalize=normalize, lam=lam)

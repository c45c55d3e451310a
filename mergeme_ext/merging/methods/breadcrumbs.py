"""Model Breadcrumbs: drop the smallest and the very largest changes, add up what is between."""

from collections.abc import Sequence

from torch import Tensor

from mergeme_ext.merging.parameters import Density, Gamma, Lambda, Normalize, Rescale, Weights
from mergeme_ext.merging.registry import Combine, Scope, merge_method
from mergeme_ext.merging.sparsify import keep_band


@merge_method(
    "breadcrumbs", paper="Davari and Belilovsky 2023, arXiv:2312.06795", scope=Scope.TENSOR
)
def breadcrumbs(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    weights: Weights,
    density: Density = 1.0,
    gamma: Gamma = 0.01,
    normalize: Normalize = False,
    lam: Lambda = 1.0,
    rescale: Rescale = "none",
) -> Combine:
    """Keep a band of magnitudes of each task vector, and sum.

    Args:
        base: Pretrained weight, any shape.
        tensors: M tuned weights, each shaped like ``base``.
        weights: M mixing weights.
        density: Fraction of each task vector kept, in (0, 1]: of n elements,
            k = max(1, floor(density * n)).
        gamma: Fraction of the largest magnitudes dropped, in [0, 1]: floor(gamma * n), at most
            n - k. The k largest of the rest are kept; of equal magnitudes, the lower index counts
            as larger.
        normalize: Divide the sum by the sum of ``weights``.
        lam: Factor on the merged task vector (the paper's alpha).
        rescale: Factor on what is left of each task vector: ``none``, ``inverse_prob`` or the norm
            to restore, ``l1``, ``l2`` or ``linf``.

    Departs from the paper: ``weights`` generalises the plain sum. Where ``gamma`` rounds to no
    element, nothing large is dropped.
    """
    thinning = keep_band(base, tensors, density, gamma, rescale)
    return thinning.combine(weights, elect="none", normalize=normalize, lam=lam)

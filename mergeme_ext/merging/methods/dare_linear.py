"""DARE: drop elements of each task vector at random, rescale the rest, and add them up."""

from collections.abc import Sequence

from torch import Tensor

from mergeme_ext.merging.parameters import (
    Density,
    Lambda,
    Normalize,
    Rescale,
    Seed,
    Weights,
)
from mergeme_ext.merging.registry import Combine, Scope, merge_method
from mergeme_ext.merging.sparsify import keep_random, mask_key


@merge_method("dare_linear", paper="Yu et al. 2024, arXiv:2311.03099", scope=Scope.TENSOR)
def dare_linear(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    weights: Weights,
    density: Density = 1.0,
    normalize: Normalize = False,
    lam: Lambda = 1.0,
    rescale: Rescale = "l1",
    seed: Seed = 0,
    tensor_name: str = "",
) -> Combine:
    """Drop at random, rescale, sum.

    Args:
        base: Pretrained weight, any shape.
        tensors: M tuned weights, each shaped like ``base``.
        weights: M mixing weights.
        density: Probability with which an element is kept, in (0, 1].
        normalize: Divide the sum by the sum of ``weights``.
        lam: Factor on the merged task vector.
        rescale: ``inverse_prob`` divides what is kept by ``density``, as the paper does; ``l1``,
            ``l2`` and ``linf`` restore that norm of the task vector; ``none``.
        seed: Chooses the random masks, together with the tensor's name.
        tensor_name: Name of the tensor; the engine fills it in.

    Departs from the paper: the default ``rescale`` is what ``rescale: true`` means in the recipes
    that people share, matching the l1 norm.
    """
    key = mask_key(seed, tensor_name)
    thinning = keep_random(base, tensors, density, rescale, key)
    return thinning.combine(weights, elect="none", normalize=normalize, lam=lam)

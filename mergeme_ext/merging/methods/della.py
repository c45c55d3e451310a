"""DELLA: drop by the rank of magnitudes, rescale, elect signs, merge what agrees."""

from collections.abc import Sequence

from torch import Tensor

from mergeme_ext.merging.parameters import (
    Density,
    Elect,
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
    "della", paper="Deep et al. 2024, arXiv:2406.11617", scope=Scope.TENSOR, whole_rows=True
)
def della(
    base: Tensor,
    tensors: Sequence[Tensor],
    *,
    weights: Weights,
    density: Density = 1.0,
    epsilon: RankWindow = 0.15,
    normalize: Normalize = True,
    lam: Lambda = 1.0,
    rescale: Rescale = "l1",
    elect: Elect = "sum",
    seed: Seed = 0,
    tensor_name: str = "",
) -> Combine:
    """Drop at random, small magnitudes more likely; rescale; elect signs; merge what agrees.

    Args:
        base: Pretrained weight, any shape; a row is the last dimension.
        tensors: M tuned weights, each shaped like ``base``.
        weights: M mixing weights; they enter the election and the mean.
        density: Mean probability with which an element is kept, in (0, 1].
        epsilon: Half the width of the window of probabilities (half the authors' window size): the
            smallest magnitude of a row is kept with ``density - epsilon``, the largest with
            ``density + epsilon``, those between evenly by rank; of equal ones the lower index ranks
            higher. Both must lie strictly between 0 and 1, unless ``density`` is 1.
        normalize: Divide by the sum of the agreeing ``weights``.
        lam: Factor on the merged task vector (the paper's lambda).
        rescale: ``inverse_prob`` divides each element by its own probability, as the paper does;
            ``l1``, ``l2`` and ``linf`` restore that norm of the task vector; ``none``.
        elect: As in ``ties``.
        seed: Chooses the random masks, together with the tensor's name.
        tensor_name: Name of the tensor; the engine fills it in.

    Raises:
        ValueError: A window reaches 0 or 1.

    Departs from the paper: the default ``rescale`` is what ``rescale: true`` means in the recipes
    that people share, matching the l1 norm.
    """
    key = mask_key(seed, tensor_name)
    thinning = keep_by_rank(base, tensors, density, epsilon, rescale, key)
    return thinning.combine(weights, elect=elect, normalize=normalize, lam=lam)

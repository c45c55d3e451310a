"""Linear: the weighted mean, or sum, of models; also called a model soup."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergeme_ext.merging.parameters import Normalize, Weights
from mergeme_ext.merging.registry import Combine, Scope, merge_method
from mergeme_ext.ops import weighted_sum


@merge_method(
    "linear", paper="Wortsman et al. 2022, arXiv:2203.05482", scope=Scope.ELEMENT, needs_base=False
)
def linear(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    *,
    weights: Weights,
    normalize: Normalize = True,
) -> Combine:
    """Sum ``weights[i] * tensors[i]``, divided by the sum of the weights if ``normalize``.

    Args:
        base: Not looked at; to have the base in the mean, list it among the models.
        tensors: M weights of one shape.
        weights: M mixing weights; negative ones are allowed.
        normalize: Divide by the sum of ``weights``.

    Raises:
        ValueError: ``normalize`` with weights that sum to zero.

    Departs from the paper: ``weights`` generalises its uniform mean, and no held-out data choose
    the models.
    """
    w = torch.tensor(weights, dtype=torch.float64)
    if normalize:
        total = w.sum()
        if total.abs() < 1e-8:
            raise ValueError(
                f"linear: expected weights with a sum other than 0 to normalize by, got {weights}"
            )
        w = w / total
    return lambda base, tensors, offset: weighted_sum(tensors, w.to(tensors[0].device))

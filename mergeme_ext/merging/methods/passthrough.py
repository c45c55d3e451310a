"""Passthrough: copy a model's weights, scaled if asked; for stacking layers of models."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergeme_ext.merging.parameters import Scales
from mergeme_ext.merging.registry import Combine, Scope, merge_method
from mergeme_ext.ops import weighted_sum


@merge_method(
    "passthrough",
    paper="depth up-scaling, Kim et al. 2023, arXiv:2312.15166",
    scope=Scope.ELEMENT,
    needs_base=False,
    num_models=(1, 1),
)
def passthrough(base: Tensor | None, tensors: Sequence[Tensor], *, scale: Scales = 1.0) -> Combine:
    """Copy the one tensor, times ``scale``.

    Args:
        base: Not looked at.
        tensors: One weight, any shape.
        scale: Factor; 1 copies every bit. A factor of 0 on what writes to the residual stream
            (``o_proj``, ``down_proj``) makes a layer the identity.

    Departs from the paper: only the copy is here. Which layers are stacked is up to the recipe, and
    nothing is trained afterwards.
    """
    factor = torch.tensor(scale, dtype=torch.float64)

    def combine(base: Tensor | None, tensors: Sequence[Tensor], offset: int) -> Tensor:
        if scale[0] == 1:
            return tensors[0].clone()
        return weighted_sum(tensors, factor.to(tensors[0].device))

    return combine

"""NuSLERP: between two models, or two task vectors, along the arc; whole, by row or by column."""

from collections.abc import Sequence

from torch import Tensor

from mergeme_ext.merging.parameters import NuslerpFlatten, NuslerpRowWise, Weights
from mergeme_ext.merging.registry import Combine, Scope, merge_method
from mergeme_ext.merging.spheres import combination, gram_of, slerp_weights

_SMALLEST_NORM = 1e-7
_SMALLEST_TOTAL = 1e-6


@merge_method(
    "nuslerp",
    paper="Arcee AI 2024, in mergekit (no paper)",
    scope=Scope.TENSOR,
    needs_base=False,
    takes_base=True,
    num_models=(2, 2),
)
def nuslerp(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    *,
    weights: Weights,
    nuslerp_flatten: NuslerpFlatten = True,
    nuslerp_row_wise: NuslerpRowWise = False,
) -> Combine:
    """Interpolate as ``slerp`` does, at t = weights[1] / (weights[0] + weights[1]).

    Args:
        base: If given, the task vectors are interpolated and added to it.
        tensors: Two weights of one shape.
        weights: Two numbers; if their sum is below 1e-6 in magnitude, t is 0.5.
        nuslerp_flatten: Take the tensor as one vector. Otherwise each stretch along one dimension
            is a vector with an angle of its own.
        nuslerp_row_wise: That dimension is the first. If false it is the last, so that each row of
            a weight ``[out, in]`` is a vector: recipes call it so, though the name says otherwise.

    Vectors whose sine is below 1e-7 are interpolated linearly; one of norm below 1e-7 is divided by
    that, so that zeros are orthogonal to everything.
    """
    total = weights[0] + weights[1]
    t = weights[1] / total if abs(total) >= _SMALLEST_TOTAL else 0.5
    axis = "all" if nuslerp_flatten else "column" if nuslerp_row_wise else "row"
    return combination(
        lambda g: slerp_weights(g, t, smallest_norm=_SMALLEST_NORM, short=_SMALLEST_NORM),
        gram_of(base, tensors, axis),
        tensors[0],
        axis=axis,
        with_base=base is not None,
    )

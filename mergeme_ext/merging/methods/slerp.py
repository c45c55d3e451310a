"""SLERP: from the base to another model along the arc between them."""

from collections.abc import Sequence

from torch import Tensor

from mergeme_ext.merging.parameters import ArcPlace
from mergeme_ext.merging.registry import Combine, Scope, merge_method
from mergeme_ext.merging.spheres import combination, gram_of, slerp_weights

_SMALLEST_NORM = 1e-8
_LARGEST_COSINE = 0.9995


@merge_method(
    "slerp",
    paper="Shoemake 1985, SIGGRAPH (no paper on arXiv)",
    scope=Scope.TENSOR,
    num_models=(1, 1),
)
def slerp(base: Tensor, tensors: Sequence[Tensor], *, t: ArcPlace) -> Combine:
    """Interpolate sin((1 - t) a) / sin(a) * base + sin(t a) / sin(a) * tensor, a their angle.

    The angle is that of the flattened tensors; the weights multiply the tensors as they are, so
    that tensors of different norms do not give one of either. Where the cosine of the angle is
    beyond 0.9995 or -0.9995 the two are interpolated linearly; of opposite tensors the middle is
    then zero. A tensor of norm 1e-8 or less is taken as it is for the angle: nearly a right one.

    Args:
        base: Weight at t = 0, any shape.
        tensors: One weight shaped like it, at t = 1.
        t: Place on the arc.

    Departs from the paper, which is about unit quaternions: lengths are not all 1.
    """
    g = gram_of(None, [base, *tensors])

    def solve(g: Tensor) -> Tensor:
        return slerp_weights(
            g, t, smallest_norm=_SMALLEST_NORM, short=1.0, largest_cosine=_LARGEST_COSINE
        )

    mix = combination(solve, g, base, axis="all", with_base=False)

    def combine(base: Tensor | None, tensors: Sequence[Tensor], offset: int) -> Tensor:
        return mix(None, [base, *tensors], offset)

    return combine

"""NearSwap: move the base towards another model where the two nearly agree."""

from collections.abc import Sequence

from torch import Tensor

from mergeme_ext.merging.parameters import NearDistance
from mergeme_ext.merging.registry import Combine, Scope, merge_method
from mergeme_ext.merging.sweep import in_parts, widened

_SMALLEST_DISTANCE = 1e-6


@merge_method(
    "nearswap",
    paper="alchemonaut 2024, in mergekit (no paper)",
    scope=Scope.ELEMENT,
    num_models=(1, 1),
)
def nearswap(base: Tensor, tensors: Sequence[Tensor], *, t: NearDistance) -> Combine:
    """Interpolate each element by g = t / abs(difference), at most 1.

    With a the base's element and c the model's, the result is g * c + (1 - g) * a: c where the two
    are at most ``t`` apart, else a moved towards c by ``t``. Distances below 1e-6 count as that.

    Args:
        base: Weight of the model that is kept, any shape.
        tensors: One weight shaped like it.
        t: Distance up to which elements are swapped, at least 0, in the unit of the weights.
    """

    def combine(base: Tensor | None, tensors: Sequence[Tensor], offset: int) -> Tensor:
        a, c = widened([base, *tensors])
        g = (t / (a - c).abs().clamp(min=_SMALLEST_DISTANCE)).clamp(0, 1)
        return (g * c + (1 - g) * a).to(tensors[0].dtype)

    return in_parts(combine)

"""Steps on flat chunks that methods in plain torch share."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["active_deltas", "widened"]


def widened(chunk: Tensor) -> Tensor:
    """Return ``chunk`` in the accumulation type: float32, or float64 if that is its own."""
    return chunk if chunk.dtype == torch.float64 else chunk.float()


def active_deltas(
    base: Tensor, tensors: Sequence[Tensor], epsilon: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for each of ``tensors``, where it is active, and its change there, zero elsewhere.

    It is active where it differs from ``base``, which is widened, by more than ``epsilon``; a NaN
    does.
    """
    for tensor in tensors:
        delta = widened(tensor) - base
        active = ~(delta.abs() <= epsilon)
        yield active, torch.where(active, delta, 0)

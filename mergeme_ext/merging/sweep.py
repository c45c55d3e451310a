"""Looking at a whole model chunk by chunk: what surveys of merge methods share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mergeme_ext.merging.registry import Combine, Visit

__all__ = [
    "BLOCK_ELEMENTS",
    "SWEEP_ELEMENTS",
    "Visits",
    "block_sum",
    "check_surveyed",
    "in_parts",
    "slices",
    "sweep",
    "task_vectors",
    "widened",
]

Visits = Callable[[], Iterator[Visit]]

# What a sweep holds of each model at a time; small enough for a second-level cache. A multiple of
# BLOCK_ELEMENTS, so that the blocks of a sum lie where they would without chunks.
SWEEP_ELEMENTS = 2**17
BLOCK_ELEMENTS = 4096


def widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return ``tensors`` in the dtype of arithmetic: float32, or float64 if one of them is."""
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [t.to(wide) for t in tensors]


def slices(numel: int, elements: int | None = None) -> Iterator[slice]:
    """Yield the stretches that make up ``numel``: of ``elements``, or of what a sweep holds."""
    elements = SWEEP_ELEMENTS if elements is None else elements
    for start in range(0, numel, elements):
        yield slice(start, min(start + elements, numel))


def task_vectors(base: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return each of ``tensors`` minus ``base``, formed in the dtype of arithmetic."""
    wide_base, *wide = widened([base, *tensors])
    return [t - wide_base for t in wide]


def sweep(visits: Visits) -> Iterator[tuple[Visit, int, list[Tensor]]]:
    """Yield the task vectors of a whole model in chunks: the visit, the offset, M flat chunks."""
    for visit in visits():
        base = visit.base.reshape(-1)
        tensors = [t.reshape(-1) for t in visit.tensors]
        for part in slices(base.numel()):
            yield visit, part.start, task_vectors(base[part], [t[part] for t in tensors])


def in_parts(combine: Combine) -> Combine:
    """Return ``combine``, element by element in nature, done in stretches that a cache holds."""

    def by_part(base: Tensor | None, tensors: Sequence[Tensor], offset: int) -> Tensor:
        out = torch.empty_like(tensors[0])
        for part in slices(out.numel()):
            base_part = None if base is None else base[part]
            out[part] = combine(base_part, [t[part] for t in tensors], offset + part.start)
        return out

    return by_part


def block_sum(x: Tensor) -> float:
    """Return the sum of flat ``x``, in float64.

    It is formed in blocks of 4096 elements, added in index order: threads change no bit.
    """
    full = x.numel() // BLOCK_ELEMENTS * BLOCK_ELEMENTS
    sums = x[:full].view(-1, BLOCK_ELEMENTS).sum(1, dtype=torch.float64).tolist()
    return sum(sums, 0.0) + x[full:].sum(dtype=torch.float64).item()


def check_surveyed(method: str, survey: Mapping[str, Any] | None, **parameters: Any) -> None:
    """Refuse to merge a tensor with other parameters than those of the survey.

    Raises:
        ValueError: There is no survey, or it was made with other values of ``parameters``.
    """
    if not survey:
        raise ValueError(f"{method}: expected a survey of the whole model, got none")
    for name, value in parameters.items():
        if survey["parameters"][name] != value:
            raise ValueError(
                f"{method}: expected the same {name} for all tensors, for the whole model is "
                f"looked at together; got {survey['parameters'][name]} and {value}"
            )

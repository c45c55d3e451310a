"""Top singular values of task vectors, from a few passes over their rows."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mergeme_ext.io.operands import Operand, num_rows

__all__ = [
    "METHOD",
    "PASSES",
    "TOP",
    "Spectrum",
    "row_ranges",
    "spectrum_of",
    "top_singular_values",
]

TOP = 8
# A block of vectors a little wider than what is wanted, multiplied by x^T x this often.
WIDTH, PASSES = TOP + 4, 6
METHOD = (
    f"block Krylov iteration on x^T x: {PASSES} passes over the rows with {WIDTH} seeded random "
    "vectors, then Rayleigh-Ritz, all in float64 (Musco and Musco 2015, arXiv:1504.05477); "
    "the values are lower bounds, tight where the spectrum decays"
)


@dataclass(frozen=True)
class Spectrum:
    """What is known of the singular values of one task vector, a matrix.

    Attributes:
        tensor: Its name; ``kind`` and ``layer`` as elsewhere.
        model: Number of the model.
        singular_values: The largest ones, at most TOP, descending.
        stable_rank: ||x||_F^2 / sigma_1^2, between 1 and the rank; NaN for a zero matrix.
        energy: Share in [0, 1] of ||x||_F^2 that ``singular_values`` hold; NaN likewise.
        norm: ||x||_F.
    """

    tensor: str
    kind: str
    layer: int | None
    model: int
    singular_values: tuple[float, ...]
    stable_rank: float
    energy: float
    norm: float


def row_ranges(operand: Operand, elements: int) -> list[tuple[int, int]]:
    """Return ranges of ``operand``'s rows of about ``elements`` each, at least a row; none of 0."""
    if 0 in operand.shape:
        return []
    step = max(1, elements // math.prod(operand.shape[1:]))
    rows = num_rows(operand)
    return [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def _task_vector_rows(base: Operand | None, model: Operand, elements: int) -> Iterator[Tensor]:
    """Yield x = ``model`` - ``base`` by rows, float64, with 0 where either is not finite."""
    for begin, end in row_ranges(model, elements):
        x = model.rows(begin, end).double()
        if base is not None:
            x = x - base.rows(begin, end).double()
        yield torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def _orthonormal(block: Tensor, basis: list[Tensor], scale: float) -> Tensor:
    """Return an orthonormal basis of what ``block`` adds to the span of ``basis``."""
    for _ in range(2):  # the second time mends what rounding left in the first
        for known in basis:
            block = block - known @ (known.T @ block)
        vectors, sizes, _ = torch.linalg.svd(block, full_matrices=False)
        block = vectors[:, sizes > 1e-10 * scale]
        scale = 1.0
    return block


def top_singular_values(
    base: Operand | None,
    model: Operand,
    *,
    seed: int,
    chunk_elements: int,
) -> tuple[list[float], float]:
    """Return the TOP largest singular values of ``model`` - ``base`` and its Frobenius norm.

    Args:
        base: ``[N, K]``; None for the singular values of the weights themselves.
        model: ``[N, K]``.
        seed: Of the random vectors.
        chunk_elements: Elements widened to float64 at a time. Beside them, K * WIDTH * PASSES * 2
            doubles are held.

    Source: block Krylov iteration, Musco and Musco 2015, arXiv:1504.05477.
    """
    columns = model.shape[1]
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(columns, min(WIDTH, columns), generator=generator, dtype=torch.float64)
    block = _orthonormal(start, [], 1.0)
    basis: list[Tensor] = []
    images: list[Tensor] = []
    square = 0.0
    for number in range(PASSES):
        image = torch.zeros_like(block)  # x^T x applied to the block
        for rows in _task_vector_rows(base, model, chunk_elements):
            image += rows.T @ (rows @ block)
            if number == 0:
                square += float((rows * rows).sum())
        basis.append(block)
        images.append(image)
        block = _orthonormal(image, basis, max(square, 1e-300))
        if block.shape[1] == 0:  # the basis holds every direction in which x is not zero
            break
    vectors = torch.cat(basis, dim=1)
    projected = vectors.T @ torch.cat(images, dim=1)
    squares = torch.linalg.eigvalsh((projected + projected.T) / 2).flip(0)
    wanted = min(TOP, *model.shape)
    values = [math.sqrt(max(0.0, s)) for s in squares[:wanted].tolist()]
    values += [0.0] * (wanted - len(values))
    return values, math.sqrt(square)


def spectrum_of(
    tensor: str,
    kind: str,
    layer: int | None,
    model: int,
    operands: tuple[Operand | None, Operand],
    *,
    seed: int,
    chunk_elements: int,
) -> Spectrum:
    """Return the spectrum of one model's task vector in one tensor."""
    digest = hashlib.sha256(f"{seed}:{tensor}:{model}".encode()).digest()
    values, norm = top_singular_values(
        *operands,
        seed=int.from_bytes(digest[:6], "little"),
        chunk_elements=chunk_elements,
    )
    largest, square = values[0] if values else 0.0, norm * norm
    return Spectrum(
        tensor=tensor,
        kind=kind,
        layer=layer,
        model=model,
        singular_values=tuple(values),
        stable_rank=square / largest**2 if largest > 0 else math.nan,
        energy=min(1.0, sum(v * v for v in values) / square) if square > 0 else math.nan,
        norm=norm,
    )

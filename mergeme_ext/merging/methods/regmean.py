"""RegMean: the linear layer whose outputs are nearest to those of all models' layers."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mergeme_ext.merging.parameters import NonDiagonalRatio, Ridge
from mergeme_ext.merging.registry import Combine, Scope, merge_method
from mergeme_ext.merging.sweep import slices
from mergeme_ext.ops import weighted_sum

# Rows are solved in blocks that lie where they would without chunks: a matrix product may differ in
# its last bits with the number of its rows.
_BLOCK_ROWS = 64
# Columns of a Gram that are widened to float64 at a time.
_STRIP_COLUMNS = 512


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let matrix products run in the calling thread, whose order of sums is then always one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@merge_method(
    "regmean",
    paper="Jin et al. 2023, arXiv:2212.09849",
    scope=Scope.TENSOR,
    needs_base=False,
    whole_rows=True,
    statistics="gram",
)
def regmean(
    base: Tensor | None,
    tensors: Sequence[Tensor],
    *,
    non_diagonal_ratio: NonDiagonalRatio = 0.9,
    ridge: Ridge = 1e-6,
    tensor_name: str = "",
    statistics: Sequence[Tensor | None] = (),
    notes: dict[str, Any] | None = None,
) -> Combine:
    """Merge ``W^T = (sum_i G_i)^-1 sum_i G_i W_i^T``, with damped Grams G_i of each layer's inputs.

    A tensor that has no Gram in every model (whatever is no weight of a linear layer, an expert
    that no token reached) gets the plain mean.

    Args:
        base: Not looked at.
        tensors: M weights ``[out, in]``, or anything for the plain mean.
        non_diagonal_ratio: Factor on the Grams' elements off the diagonal, in [0, 1] (the paper's
            alpha); 0 leaves a mean weighted by the inputs' squares.
        ridge: Added to every Gram's diagonal, as a fraction of the mean of all their diagonals, so
            that inputs which no model has seen get the mean; at least 0.
        tensor_name: Name of the tensor; the engine fills it in.
        statistics: M Grams ``[in, in]``: the mean over tokens of x x^T; None where there is none.
        notes: Says which tensors got the plain mean.

    Raises:
        ValueError: A Gram does not have the shape that the weight asks for, or the sum of all is
            not positive definite, which a ridge prevents.

    The solve is a Cholesky decomposition in float64 and takes two matrices ``[in, in]`` of memory.
    """
    given = [gram for gram in statistics if gram is not None]
    for gram in given:
        size = tensors[0].shape[-1] if tensors[0].dim() == 2 else None
        if size is None or gram.shape != (size, size):
            raise ValueError(
                f"regmean: expected a Gram of the inputs of a weight [out, in], [in, in], got "
                f"{list(gram.shape)} for tensor {tensor_name!r} {list(tensors[0].shape)}"
            )
    added = 0.0
    if given:
        added = ridge * sum(g.diagonal().double().mean().item() for g in given) / len(given)
    unseen = not given or (ridge > 0 and added == 0)
    if len(given) < len(tensors) or unseen or tensors[0].numel() == 0:
        if notes is not None:
            notes["regmean"] = "no Gram: plain mean"
        mean = torch.full((len(tensors),), 1 / len(tensors), dtype=torch.float64)
        return lambda base, tensors, offset: weighted_sum(tensors, mean.to(tensors[0].device))

    with _one_thread():
        factor, failed = torch.linalg.cholesky_ex(
            _total(given, non_diagonal_ratio, added, tensors[0].device)
        )
    if failed:
        raise ValueError(
            f"regmean: expected the Grams of tensor {tensor_name!r} to have a positive definite "
            f"sum, got one whose leading minor of order {int(failed)} is not; raise ridge"
        )
    columns = tensors[0].shape[1]

    def combine(base: Tensor | None, chunks: Sequence[Tensor], offset: int) -> Tensor:
        begin, end = offset // columns, (offset + chunks[0].numel()) // columns
        first = begin // _BLOCK_ROWS * _BLOCK_ROWS
        last = min(-(-end // _BLOCK_ROWS) * _BLOCK_ROWS, tensors[0].shape[0])
        right = torch.zeros(last - first, columns, dtype=torch.float64, device=factor.device)
        with _one_thread():
            for weight, gram in zip(tensors, given, strict=True):
                _add_product(right, weight[first:last].double(), gram, non_diagonal_ratio, added)
            for rows in slices(last - first, _BLOCK_ROWS):
                right[rows] = torch.cholesky_solve(right[rows].t(), factor).t()
        merged = right[begin - first : end - first].reshape(-1)
        return merged.to(chunks[0].device, chunks[0].dtype)

    return combine


def _total(grams: Sequence[Tensor], ratio: float, added: float, device: torch.device) -> Tensor:
    """Return the sum of the damped Grams, in float64."""
    total = torch.zeros(grams[0].shape, dtype=torch.float64, device=device)
    diagonal = total.new_zeros(total.shape[0])
    for gram in grams:
        for rows in slices(gram.shape[0], _STRIP_COLUMNS):
            total[rows] += gram[rows].to(total)
        diagonal += gram.diagonal().to(total)
    total *= ratio
    total.diagonal().copy_(diagonal + len(grams) * added)
    return total


def _add_product(right: Tensor, weight: Tensor, gram: Tensor, ratio: float, added: float) -> None:
    """Add ``weight`` times the damped ``gram`` to ``right``, block by block of rows."""
    for strip in slices(gram.shape[1], _STRIP_COLUMNS):
        damped = gram[:, strip].to(weight)
        diagonal = damped.diagonal(-strip.start)
        kept = diagonal + added
        damped *= ratio
        diagonal.copy_(kept)
        for rows in slices(weight.shape[0], _BLOCK_ROWS):
            right[rows, strip] += weight[rows] @ damped

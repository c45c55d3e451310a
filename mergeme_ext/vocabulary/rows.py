"""One model's embedding or head in another vocabulary, computed row by row."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mergeme_ext.io.operands import Operand, check_rows, num_rows

__all__ = ["AVERAGE", "ZERO", "VocabularyRows", "gather"]

# In place of a model's number: a row of zeros, or the mean of the rows of all that have one.
ZERO = -1
AVERAGE = -2
# Rows this near each other are read in one go from operands that are not stored.
_GAP = 16
_SPAN = 4096


class VocabularyRows:
    """A matrix whose rows are those of other matrices, in any order. It is an operand itself.

    Averages are summed in float64 in the order of the models and rounded once.

    Args:
        model: int32 ``[size]``: which operand each row comes from, or ``ZERO`` or ``AVERAGE``.
        index: int64 ``[size]``: the row there; of no meaning for ``ZERO`` and ``AVERAGE``.
        own: For each operand, int64 ``[size]``: its row for each of ours, or -1.
        operands: What to read. Those that are read must agree in all dimensions but the first.

    Attributes:
        models: Numbers of the operands that are read, ascending.
    """

    def __init__(
        self, model: Tensor, index: Tensor, own: Sequence[Tensor], operands: Sequence[Operand]
    ):
        self._model, self._index, self._own = model, index, own
        self._operands = operands
        used = {m for m in model.unique().tolist() if m >= 0}
        averaged = model == AVERAGE
        averages = bool(averaged.any())
        if averages:
            used.update(m for m, rows in enumerate(own) if bool((rows[averaged] >= 0).any()))
        self.models = sorted(used)
        self._used = [operands[m] for m in self.models]
        first = self._used[0] if self._used else operands[0]
        self.dtype = torch.float32 if averages else first.dtype
        for operand in self._used:
            self.dtype = torch.promote_types(self.dtype, operand.dtype)
        self.shape = (model.shape[0], *first.shape[1:])

    def stored(self) -> Tensor | None:
        """Return None: the rows lie in no file in this order."""
        return None

    def rows(self, begin: int, end: int) -> Tensor:
        """Return rows ``[begin, end)`` in fresh memory."""
        check_rows(self, begin, end)
        model, index = self._model[begin:end], self._index[begin:end]
        out = torch.empty((end - begin, *self.shape[1:]), dtype=self.dtype)
        for m in model.unique().tolist():
            here = (model == m).nonzero().flatten()
            if m == ZERO:
                out[here] = 0
            elif m == AVERAGE:
                out[here] = self._average(here + begin)
            else:
                out[here] = gather(self._operands[m], index[here]).to(self.dtype)
        return out

    def _average(self, ids: Tensor) -> Tensor:
        total = torch.zeros((len(ids), *self.shape[1:]), dtype=torch.float64)
        count = torch.zeros((len(ids), *[1] * (len(self.shape) - 1)), dtype=torch.float64)
        for operand, own in zip(self._operands, self._own, strict=True):
            rows = own[ids]
            has = (rows >= 0).nonzero().flatten()
            if len(has):
                total[has] += gather(operand, rows[has]).double()
                count[has] += 1
        return (total / count).to(self.dtype)

    def prefetch(self) -> None:
        """Ask the system to start reading all that is read from."""
        for operand in self._used:
            operand.prefetch()

    def release(self) -> None:
        """Give back the memory of all that is read from."""
        for operand in self._used:
            operand.release()


def gather(operand: Operand, index: Tensor) -> Tensor:
    """Return the rows of ``operand`` that ``index`` (int64 ``[n]``) names, in fresh memory."""
    whole = operand.stored()
    if whole is not None:
        return whole.index_select(0, index)
    out = torch.empty((len(index), *operand.shape[1:]), dtype=operand.dtype)
    if len(index) == 0:
        return out
    if int(index.max()) >= num_rows(operand):
        raise IndexError(f"expected rows below {num_rows(operand)}, got {int(index.max())}")
    order = index.argsort(stable=True)
    wanted = index[order]
    start = 0
    for position in [*((wanted.diff() > _GAP).nonzero().flatten() + 1).tolist(), len(wanted)]:
        while start < position:
            first = int(wanted[start])
            stop = min(position, int(torch.searchsorted(wanted, first + _SPAN)))
            block = operand.rows(first, int(wanted[stop - 1]) + 1)
            out[order[start:stop]] = block[wanted[start:stop] - first]
            start = stop
    return out

"""Inner products of all pairs of M task vectors, whole and by rows, against torch's matmuls."""

import torch

import mergeme_ext
from benchmarks import harness
from benchmarks.task_vectors import CASES as WEIGHTS
from benchmarks.task_vectors import bytes_read, make_weights, numel

__all__ = ["CASES", "CONTENDERS", "OP", "make", "work"]

OP = "gram"
CASES = {
    f"{name}_{axis}" if name != "smoke" else name: {**case, "axis": axis}
    for name, case in WEIGHTS.items()
    for axis in (["row"] if name == "smoke" else ["all", "row", "column"])
}


def make(case, device):
    return (*make_weights(case, device), case["axis"])


def work(case):
    pairs = case["models"] * (case["models"] + 1) // 2
    return bytes_read(case), (case["models"] + 2 * pairs) * numel(case)


def _mergeme(base, tensors, axis):
    return mergeme_ext.gram(base, tensors, axis=axis)


def _eager(base, tensors, axis):
    deltas = torch.stack([t.float() - base.float() for t in tensors])
    shape = {"all": "mrc,nrc->mn", "row": "mrc,nrc->rmn", "column": "mrc,nrc->cmn"}[axis]
    out = torch.einsum(shape, deltas, deltas)
    return out.reshape(-1, len(tensors), len(tensors)).double()


CONTENDERS = {"mergeme": _mergeme, "eager": _eager}

if __name__ == "__main__":
    harness.main(__name__)

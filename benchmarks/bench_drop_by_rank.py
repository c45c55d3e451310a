"""Dropping M task vectors by the ranks of their magnitudes against torch's sort."""

import torch

import mergeme_ext
from benchmarks import harness
from benchmarks.task_vectors import CASES, bytes_read, make_weights, numel

__all__ = ["CASES", "CONTENDERS", "OP", "make", "work"]

OP = "drop_by_rank"
LOW, HIGH = 1.0, 1.0  # contenders draw other random numbers, but must agree: nothing is dropped


def make(case, device):
    base, tensors = make_weights(case, device)
    rows = [[LOW, HIGH]] * case["models"]
    return base, tensors, torch.tensor(rows, dtype=torch.float64, device=base.device)


def work(case):
    written = 4 * case["models"] * numel(case)
    return bytes_read(case) + written, 10 * case["models"] * numel(case)


def _mergeme(base, tensors, selection):
    return mergeme_ext.drop_by_rank(base, tensors, selection, key=1)


def _eager(base, tensors, selection):
    wide, out = base.float(), []
    for tensor, (low, high) in zip(tensors, selection.tolist(), strict=True):
        delta = tensor.float() - wide
        ranks = delta.abs().argsort(-1).argsort(-1)
        q = low + (high - low) / (delta.shape[-1] - 1) * ranks
        out.append(torch.where(torch.rand_like(delta) < q, delta, 0))
    return torch.stack(out)


CONTENDERS = {"mergeme": _mergeme, "eager": _eager}

if __name__ == "__main__":
    harness.main(__name__)

"""Norms of M task vectors before and after trimming against torch's reductions."""

import torch

import mergeme_ext
from benchmarks import harness
from benchmarks.task_vectors import CASES, DENSITY, bytes_read, make_weights, numel

__all__ = ["CASES", "CONTENDERS", "OP", "make", "work"]

OP = "masked_norms"


def make(case, device):
    base, tensors = make_weights(case, device)
    keep = [int(DENSITY * numel(case))] * case["models"]
    return base, tensors, mergeme_ext.magnitude_threshold(base, tensors, keep)


def work(case):
    return bytes_read(case), 6 * case["models"] * numel(case)


def _mergeme(base, tensors, cuts):
    return mergeme_ext.masked_norms(base, tensors, cuts, mask="magnitude")


def _eager(base, tensors, cuts):
    wide, rows = base.float(), []
    for tensor, cut in zip(tensors, cuts[:, 0].float(), strict=True):
        delta = (tensor.float() - wide).flatten()
        kept = torch.where(delta.abs() >= cut, delta, 0)
        rows.append(
            [torch.linalg.vector_norm(x, p) for x in (delta, kept) for p in (1, 2, torch.inf)]
        )
    return torch.tensor(rows, dtype=torch.float64, device=base.device)


CONTENDERS = {"mergeme": _mergeme, "eager": _eager}

if __name__ == "__main__":
    harness.main(__name__)

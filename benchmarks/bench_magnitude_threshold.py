"""Exact trimming thresholds of M task vectors against torch's k-th value."""

import torch

import mergeme_ext
from benchmarks import harness
from benchmarks.task_vectors import CASES, DENSITY, bytes_read, make_weights, numel

__all__ = ["CASES", "CONTENDERS", "OP", "make", "work"]

OP = "magnitude_threshold"


def make(case, device):
    base, tensors = make_weights(case, device)
    return base, tensors, [int(DENSITY * numel(case))] * case["models"]


def work(case):
    return bytes_read(case), 2 * case["models"] * numel(case)


def _mergeme(base, tensors, keep):
    return mergeme_ext.magnitude_threshold(base, tensors, keep)[:, 0]


def _eager(base, tensors, keep):
    wide, rows = base.float(), []
    for tensor, k in zip(tensors, keep, strict=True):
        magnitude = (tensor.float() - wide).abs().flatten()
        rows.append(magnitude.kthvalue(magnitude.numel() - k + 1).values.double())
    return torch.stack(rows)


CONTENDERS = {"mergeme": _mergeme, "eager": _eager}

if __name__ == "__main__":
    harness.main(__name__)

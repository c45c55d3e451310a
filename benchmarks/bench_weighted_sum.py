"""The weighted sum of M weights against torch's running sum."""

import torch

import mergeme_ext
from benchmarks import harness
from benchmarks.task_vectors import CASES, bytes_read, bytes_written, make_weights, numel

__all__ = ["CASES", "CONTENDERS", "OP", "make", "work"]

OP = "weighted_sum"


def make(case, device):
    _, tensors = make_weights(case, device)
    weights = torch.linspace(0.5, 1.5, case["models"], dtype=torch.float64, device=device)
    return tensors, weights


def work(case):
    return bytes_read(case, with_base=False) + bytes_written(case), 2 * case["models"] * numel(case)


def _eager(tensors, weights):
    out = torch.zeros_like(tensors[0], dtype=torch.float32)
    for tensor, weight in zip(tensors, weights.tolist(), strict=True):
        out.add_(tensor, alpha=weight)
    return out.to(tensors[0].dtype)


CONTENDERS = {"mergeme": mergeme_ext.weighted_sum, "eager": _eager}

if __name__ == "__main__":
    harness.main(__name__)

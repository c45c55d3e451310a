"""The TIES step on trimmed task vectors (elect signs, average, add) against torch's own ops."""

import torch

import mergeme_ext
from benchmarks import harness
from benchmarks.task_vectors import (
    CASES,
    DENSITY,
    bytes_read,
    bytes_written,
    make_weights,
    numel,
)

__all__ = ["CASES", "CONTENDERS", "OP", "make", "work"]

OP = "merge_task_vectors"


def make(case, device):
    base, tensors = make_weights(case, device)
    keep = [int(DENSITY * numel(case))] * case["models"]
    return base, tensors, mergeme_ext.magnitude_threshold(base, tensors, keep)


def work(case):
    return bytes_read(case) + bytes_written(case), 6 * case["models"] * numel(case)


def _mergeme(base, tensors, cuts):
    ones = torch.ones(len(tensors), dtype=torch.float64, device=base.device)
    return mergeme_ext.merge_task_vectors(
        base, tensors, ones, ones, cuts, mask="magnitude", elect="sum", normalize=True, lam=0.5
    )


def _eager(base, tensors, cuts):
    wide = base.float()
    trimmed = torch.stack([t.float() - wide for t in tensors])
    trimmed[trimmed.abs() < cuts[:, 0].float().view(-1, 1, 1)] = 0
    positive = trimmed.sum(0) >= 0
    agrees = torch.where(positive, trimmed > 0, trimmed < 0)
    mean = (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    return (wide + 0.5 * mean).to(base.dtype)


CONTENDERS = {"mergeme": _mergeme, "eager": _eager}

if __name__ == "__main__":
    harness.main(__name__)

"""Sorts, and takes the first ones: which elements a cut must keep, and where it must lie."""

import math

import torch


def task_vector(base, tensor):
    acc = torch.float64 if base.dtype == torch.float64 else torch.float32
    return (tensor.detach().cpu().to(acc) - base.detach().cpu().to(acc)).double().flatten()


def magnitude_threshold(base, tensors, keep):
    rows = []
    for tensor, count in zip(tensors, keep, strict=True):
        x = [math.inf if math.isnan(v) else abs(v) for v in task_vector(base, tensor).tolist()]
        order = sorted(range(len(x)), key=lambda i: (-x[i], i))
        last = order[count - 1] if count else None
        rows.append((math.inf, 0.0) if last is None else (x[last], last + 1.0))
    return torch.tensor(rows, dtype=torch.float64)


def kept(base, tensor, row):
    """The elements that a cut (threshold, tie_end) keeps, as its contract states."""
    x = task_vector(base, tensor).abs()
    index = torch.arange(x.numel())
    return (x > row[0]) | ((x == row[0]) & (index < row[1])) | x.isnan()

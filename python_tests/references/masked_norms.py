"""Norms of task vectors in float64, with exact sums."""

import math

import torch

from python_tests.references.magnitude_threshold import task_vector


def norms(x):
    x = [abs(v) for v in x.tolist()]
    return [math.fsum(x), math.sqrt(math.fsum(v * v for v in x)), max(x, default=0.0)]


def masked_norms(base, tensors, kept):
    """``kept`` holds one boolean mask of the flattened tensor for each model."""
    rows = []
    for tensor, mask in zip(tensors, kept, strict=True):
        x = task_vector(base, tensor)
        rows.append(norms(x) + norms(x[mask]))
    return torch.tensor(rows, dtype=torch.float64)

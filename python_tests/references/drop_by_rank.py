"""Sorts each row, and draws for one element after another."""

import math

import torch

from python_tests.references.magnitude_threshold import task_vector
from python_tests.references.philox import uniforms


def ranks(row):
    """By magnitude from 0, the smallest; of equal ones the lower index ranks higher."""
    size = [math.inf if math.isnan(v) else abs(v) for v in row]
    nan = [math.isnan(v) for v in row]
    order = sorted(range(len(row)), key=lambda i: (nan[i], size[i], -i))
    out = [0] * len(row)
    for rank, i in enumerate(order):
        out[i] = rank
    return out


def probabilities(row, low, high):
    if len(row) < 2:
        return [(low + high) / 2] * len(row)
    return [low + (high - low) / (len(row) - 1) * r for r in ranks(row)]


def drop_by_rank(base, tensors, selection, *, key, offset, inverse_prob):
    """float64 ``[M, *base]``; the differences are those of the accumulation type."""
    length = base.shape[-1] if base.dim() else 1
    out = []
    for m, (tensor, (low, high)) in enumerate(zip(tensors, selection.tolist(), strict=True)):
        x = task_vector(base, tensor).tolist()
        kept = []
        bits = uniforms(key % 2**64, m, range(offset, offset + len(x))).tolist() if x else []
        for start in range(0, len(x), max(1, length)):
            row = x[start : start + length]
            for i, (v, q) in enumerate(zip(row, probabilities(row, low, high), strict=True)):
                keeps = bits[start + i] < round(q * 65536)
                kept.append((v / q if inverse_prob else v) if keeps else 0.0)
        out.append(torch.tensor(kept, dtype=torch.float64).view(base.shape))
    return torch.stack(out)

"""LoRA and DoRA in float64, element by element where it matters."""

import torch


def update(a, b, scale):
    """[out, in] from A [r, in] and B [out, r]."""
    return scale * (b.double() @ a.double())


def magnitude_bound(a, b, scale):
    """Sum of absolute terms of ``update``."""
    return abs(scale) * (b.double().abs() @ a.double().abs())


def dora(weight, a, b, scale, magnitude):
    """[out, in]: each output's row scaled to its magnitude."""
    adapted = weight.double() + update(a, b, scale)
    out = torch.empty_like(adapted)
    for i, row in enumerate(adapted):
        out[i] = magnitude[i].double() * row / sum(x * x for x in row.tolist()) ** 0.5
    return out

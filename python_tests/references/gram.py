"""Inner products in float64, with exact sums."""

import math

import torch

from python_tests.references.magnitude_threshold import task_vector


def vectors(x, shape, axis):
    """The vectors of a flattened tensor along ``axis``, as lists."""
    if axis == "all" or len(shape) == 0:
        return [x.tolist()]
    if axis == "row":
        return x.view(math.prod(shape[:-1]), shape[-1]).tolist()
    return x.view(shape[0], math.prod(shape[1:])).t().tolist()


def gram(base, tensors, axis):
    """The matrices, and the sums of absolute products behind them."""
    shape = tensors[0].shape
    if base is None:
        base = torch.zeros_like(tensors[0])
    split = [vectors(task_vector(base, t), shape, axis) for t in tensors]
    value, size = [], []
    for group in zip(*split, strict=True):
        products = [[[a * b for a, b in zip(x, y, strict=True)] for y in group] for x in group]
        value.append([[math.fsum(p) for p in row] for row in products])
        size.append([[math.fsum(abs(v) for v in p) for p in row] for row in products])
    empty = (len(split[0]), len(tensors), len(tensors))
    return tuple(torch.tensor(x, dtype=torch.float64).reshape(empty) for x in (value, size))

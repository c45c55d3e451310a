"""float64 weighted sum, one loop."""

import torch


def weighted_sum(tensors, weights):
    value = torch.zeros(tensors[0].shape, dtype=torch.float64)
    magnitude = torch.zeros_like(value)
    for tensor, weight in zip(tensors, weights.tolist(), strict=True):
        value += weight * tensor.detach().double().cpu()
        magnitude += abs(weight) * tensor.detach().double().cpu().abs()
    return value, magnitude

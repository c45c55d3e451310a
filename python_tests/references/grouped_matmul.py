"""float64 references: one product per expert in a loop. Each returns value and magnitude."""

from itertools import pairwise

import torch


def _groups(expert_offsets):
    return pairwise(expert_offsets.tolist())


def _by_rows(a, matrices, expert_offsets):
    a, matrices = a.detach().double().cpu(), matrices.detach().double().cpu()
    value = torch.zeros(a.shape[0], matrices.shape[2], dtype=torch.float64)
    magnitude = torch.zeros_like(value)
    for e, (begin, end) in enumerate(_groups(expert_offsets)):
        value[begin:end] = a[begin:end] @ matrices[e]
        magnitude[begin:end] = a[begin:end].abs() @ matrices[e].abs()
    return value, magnitude


def grouped_matmul_nt(a, b, expert_offsets):
    return _by_rows(a, b.transpose(1, 2), expert_offsets)


def grouped_matmul_nn(a, b, expert_offsets):
    return _by_rows(a, b, expert_offsets)


def grouped_matmul_tn(a, b, expert_offsets):
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    value = torch.zeros(len(expert_offsets) - 1, a.shape[1], b.shape[1], dtype=torch.float64)
    magnitude = torch.zeros_like(value)
    for e, (begin, end) in enumerate(_groups(expert_offsets)):
        value[e] = a[begin:end].T @ b[begin:end]
        magnitude[e] = a[begin:end].abs().T @ b[begin:end].abs()
    return value, magnitude

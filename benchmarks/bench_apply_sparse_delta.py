"""Sparse delta application against torch's own scatter-add."""

import torch

import mergeme_ext
from benchmarks import harness

OP = "apply_sparse_delta"
CASES = {
    "smoke": {"shape": (64, 64), "density": 0.1, "dtype": torch.float32},
    "llama7b_q_proj": {"shape": (4096, 4096), "density": 0.1, "dtype": torch.bfloat16},
    "llama7b_gate_proj": {"shape": (11008, 4096), "density": 0.05, "dtype": torch.bfloat16},
}


def make(case, device):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(case["shape"], generator=generator).to(case["dtype"])
    nnz = int(case["density"] * base.numel())
    indices = torch.randperm(base.numel(), generator=generator)[:nnz].sort().values
    values = torch.randn(nnz, generator=generator).to(case["dtype"])
    return base.to(device), base.to(device, copy=True), indices.to(device), values.to(device)


def work(case):
    numel = case["shape"][0] * case["shape"][1]
    nnz, size = int(case["density"] * numel), case["dtype"].itemsize
    # Base read and written once, each non-zero's index and value read, its target read and written.
    return 2 * numel * size + nnz * (8 + 3 * size), 2 * nnz


def _ours(base, _, indices, values):
    return mergeme_ext.apply_sparse_delta(base, indices, values, 0.5)


def _in_place(_, target, indices, values):
    """Only the first call, whose result is checked, starts from base; later ones add once more."""
    mergeme_ext.apply_sparse_delta_(target, indices, values, 0.5)
    return target


def _eager(base, _, indices, values):
    return base.flatten().index_add(0, indices, values, alpha=0.5).view_as(base)


CONTENDERS = {"mergeme": _ours, "mergeme_in_place": _in_place, "eager": _eager}

if __name__ == "__main__":
    harness.main(__name__)

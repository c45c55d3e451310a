"""Weighted sum of checkpoints against torch."""

import torch

import mergeme_ext
from benchmarks import harness

OP = "weighted_sum"
CASES = {
    "smoke": {"shape": (64, 64), "models": 2, "dtype": torch.float32},
    "llama7b_q_proj": {"shape": (4096, 4096), "models": 3, "dtype": torch.bfloat16},
    "llama7b_gate_proj": {"shape": (11008, 4096), "models": 4, "dtype": torch.bfloat16},
    "float32": {"shape": (4096, 4096), "models": 3, "dtype": torch.float32},
}


def make(case, device):
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(case["shape"], generator=generator).to(case["dtype"]).to(device)
        for _ in range(case["models"])
    ]
    weights = torch.linspace(0.5, 1.5, case["models"], dtype=torch.float64, device=device)
    return tensors, weights


def work(case):
    numel = case["shape"][0] * case["shape"][1]
    # Every model read and the sum written once; one product and one addition for each element read.
    return (case["models"] + 1) * numel * case["dtype"].itemsize, 2 * case["models"] * numel


def _eager(tensors, weights):
    total = sum(w * t.float() for w, t in zip(weights.tolist(), tensors, strict=True))
    return total.to(tensors[0].dtype)


CONTENDERS = {"mergeme": mergeme_ext.weighted_sum, "eager": _eager}

if __name__ == "__main__":
    harness.main(__name__)

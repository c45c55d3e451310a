"""Exact magnitude thresholds against a stable sort of each task vector."""

import torch

import mergeme_ext
from benchmarks import harness
from benchmarks.merge_inputs import models

OP = "magnitude_threshold"
CASES = {
    "smoke": {"shape": (64, 64), "models": 2, "density": 0.5, "dtype": torch.float32},
    "llama7b_q_proj": {"shape": (4096, 4096), "models": 3, "density": 0.8, "dtype": torch.bfloat16},
    "sparse": {"shape": (4096, 4096), "models": 3, "density": 0.2, "dtype": torch.bfloat16},
    "float32": {"shape": (4096, 4096), "models": 3, "density": 0.8, "dtype": torch.float32},
}


def make(case, device):
    base, tensors = models(case, device)
    return base, tensors, [int(case["density"] * base.numel())] * len(tensors)


def work(case):
    numel = case["shape"][0] * case["shape"][1]
    # The least: base and models read once. A comparison is no flop.
    return (case["models"] + 1) * numel * case["dtype"].itemsize, case["models"] * numel


def _eager(base, tensors, keep):
    rows = []
    for tensor, count in zip(tensors, keep, strict=True):
        x = (tensor.float() - base.float()).abs().flatten()
        values, order = torch.sort(x, descending=True, stable=True)
        rows.append(torch.stack([values[count - 1].double(), order[count - 1].double() + 1]))
    return torch.stack(rows)


CONTENDERS = {"mergeme": mergeme_ext.magnitude_threshold, "eager": _eager}

if __name__ == "__main__":
    harness.main(__name__)

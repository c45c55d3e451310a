"""Norms of trimmed or dropped task vectors against torch."""

import torch

import mergeme_ext
from benchmarks import harness
from benchmarks.merge_inputs import models

OP = "masked_norms"
CASES = {
    "smoke": {"shape": (64, 64), "models": 2, "mask": "random", "dtype": torch.float32},
    "llama7b_q_proj_dropped": {
        "shape": (4096, 4096),
        "models": 3,
        "mask": "random",
        "dtype": torch.bfloat16,
    },
    "llama7b_q_proj_trimmed": {
        "shape": (4096, 4096),
        "models": 3,
        "mask": "magnitude",
        "dtype": torch.bfloat16,
    },
}


def make(case, device):
    base, tensors = models(case, device)
    # A probability of one, so that torch's own random mask agrees; the bits are drawn all the same.
    selection = torch.tensor([[1.0, 0.0]] * len(tensors), dtype=torch.float64, device=device)
    if case["mask"] == "magnitude":
        keep = [int(0.8 * base.numel())] * len(tensors)
        selection = mergeme_ext.magnitude_threshold(base, tensors, keep)
    return base, tensors, selection, case["mask"]


def work(case):
    numel = case["shape"][0] * case["shape"][1]
    # Base and models read once; a difference and four sums, two of squares, for each model.
    return (case["models"] + 1) * numel * case["dtype"].itemsize, 7 * case["models"] * numel


def _ours(base, tensors, selection, mask):
    return mergeme_ext.masked_norms(base, tensors, selection, mask=mask, key=1)


def _eager(base, tensors, selection, mask):
    rows = []
    for tensor, (first, _) in zip(tensors, selection.tolist(), strict=True):
        x = tensor.float() - base.float()
        kept = torch.empty_like(x).bernoulli_(first) if mask == "random" else x.abs() >= first
        both = x, x * kept
        rows.append(torch.stack([y.norm(p) for y in both for p in (1, 2, float("inf"))]))
    return torch.stack(rows).double()


CONTENDERS = {"mergeme": _ours, "eager": _eager}

if __name__ == "__main__":
    harness.main(__name__)

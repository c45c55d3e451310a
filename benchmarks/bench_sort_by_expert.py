"""Stable sort of routed slots by expert, against torch's own sort."""

import torch

import mergeme_ext
from benchmarks import harness

OP = "sort_by_expert"
CASES = {
    "smoke": {"tokens": 33, "top_k": 2, "num_experts": 8},
    "mixtral": {"tokens": 4096, "top_k": 2, "num_experts": 8},
    "experts64_top8": {"tokens": 4096, "top_k": 8, "num_experts": 64},  # OLMoE
    "experts256_top8": {"tokens": 4096, "top_k": 8, "num_experts": 256},  # DeepSeek-V3
    "decode": {"tokens": 16, "top_k": 8, "num_experts": 256},
}


def make(case, device):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(case["tokens"], case["num_experts"], generator=generator)
    ids = logits.topk(case["top_k"], -1).indices.int()
    return ids.to(device), case["num_experts"]


def work(case):
    slots = case["tokens"] * case["top_k"]
    return 4 * (3 * slots + case["num_experts"] + 1), 0


def _eager(ids, num_experts):
    flat = ids.flatten()
    experts, permutation = flat.sort(stable=True)
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(flat), device=ids.device)
    bounds = torch.arange(num_experts + 1, device=ids.device, dtype=ids.dtype)
    return torch.searchsorted(experts, bounds), permutation, inverse


CONTENDERS = {"mergeme": mergeme_ext.sort_by_expert, "eager": _eager}

if __name__ == "__main__":
    harness.main(__name__)

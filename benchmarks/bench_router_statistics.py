"""Router statistics against the eager steps they replace."""

import torch

import mergeme_ext
from benchmarks import harness

OP = "router_statistics"
CASES = {
    "smoke": {"tokens": 33, "num_experts": 8, "top_k": 2},
    "mixtral": {"tokens": 4096, "num_experts": 8, "top_k": 2},
    "experts64_top8": {"tokens": 4096, "num_experts": 64, "top_k": 8},  # OLMoE
    "experts256_top8": {"tokens": 4096, "num_experts": 256, "top_k": 8},  # DeepSeek-V3
}


def make(case, device):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(case["tokens"], case["num_experts"], generator=generator)
    ids = logits.topk(case["top_k"], -1).indices.int()
    return logits.to(device), ids.to(device)


def work(case):
    tokens, num_experts = case["tokens"], case["num_experts"]
    # Logits and ids read once; one exponential for each logit.
    return 4 * tokens * (num_experts + case["top_k"]), tokens * num_experts


def _eager(logits, ids):
    counts = ids.flatten().bincount(minlength=logits.shape[1])
    return counts, logits.softmax(-1).sum(0), logits.logsumexp(-1).square().sum()


CONTENDERS = {"mergeme": mergeme_ext.router_statistics, "eager": _eager}

if __name__ == "__main__":
    harness.main(__name__)

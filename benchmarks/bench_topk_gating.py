"""Top-k gating against the three eager steps it replaces."""

import torch

import mergeme_ext
from benchmarks import harness

OP = "topk_gating"
CASES = {
    "smoke": {"tokens": 33, "num_experts": 8, "top_k": 2},
    "mixtral": {"tokens": 4096, "num_experts": 8, "top_k": 2},
    "experts64_top8": {"tokens": 4096, "num_experts": 64, "top_k": 8},  # OLMoE
    "experts256_top8": {"tokens": 4096, "num_experts": 256, "top_k": 8},
    "deepseek_v3": {
        "tokens": 4096,
        "num_experts": 256,
        "top_k": 8,
        "options": {"score": "sigmoid", "scale": 2.5},
        "bias": True,
    },
}


def make(case, device):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(case["tokens"], case["num_experts"], generator=generator).to(device)
    bias = None
    if case.get("bias"):
        bias = (0.1 * torch.randn(case["num_experts"], generator=generator)).to(device)
    return logits, bias, case["top_k"], case.get("options", {})


def work(case):
    tokens, num_experts = case["tokens"], case["num_experts"]
    # Logits read once, an id and a weight written for each slot; one exponential for each logit.
    return tokens * (4 * num_experts + 8 * case["top_k"]), tokens * num_experts


def _ours(logits, bias, top_k, options):
    return mergeme_ext.topk_gating(logits, bias, top_k, **options)


def _eager(logits, bias, top_k, options):
    scores = logits.sigmoid() if options.get("score") == "sigmoid" else logits.softmax(-1)
    ids = (scores if bias is None else scores + bias).topk(top_k, -1).indices
    weights = scores.gather(-1, ids)
    return ids, weights / weights.sum(-1, keepdim=True) * options.get("scale", 1.0)


CONTENDERS = {"mergeme": _ours, "eager": _eager}

if __name__ == "__main__":
    harness.main(__name__)

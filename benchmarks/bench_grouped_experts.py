"""The expert half of a Mixture-of-Experts block, routing given."""

import torch
import torch.nn.functional as F

from benchmarks import harness
from mergeme_ext.ops import grouped_experts

OP = "grouped_experts"


def _case(experts, hidden, intermediate, top_k, tokens, dtype):
    return {
        "experts": experts,
        "hidden": hidden,
        "intermediate": intermediate,
        "top_k": top_k,
        "tokens": tokens,
        "dtype": dtype,
    }


CASES = {
    "smoke": _case(3, 24, 16, 2, 9, torch.float32),
    # Experts of a small model's size, decoding and prefill.
    "small-16": _case(8, 1024, 512, 2, 16, torch.float32),
    "small-512": _case(8, 1024, 512, 2, 512, torch.float32),
    "small-16-bf16": _case(8, 1024, 512, 2, 16, torch.bfloat16),
    "small-512-bf16": _case(8, 1024, 512, 2, 512, torch.bfloat16),
    # Fine-grained experts.
    "fine-512-bf16": _case(64, 1024, 512, 8, 512, torch.bfloat16),
}


def make(case, device):
    g = torch.Generator().manual_seed(0)
    e, h, i, dtype = case["experts"], case["hidden"], case["intermediate"], case["dtype"]
    x = torch.randn(case["tokens"], h, generator=g)
    gate_up = torch.randn(e, 2 * i, h, generator=g) / h**0.5
    down = torch.randn(e, h, i, generator=g) / i**0.5
    scores = torch.randn(case["tokens"], e, generator=g).topk(case["top_k"])
    permutation = scores.indices.flatten().argsort(stable=True)
    counts = scores.indices.flatten().bincount(minlength=e)
    routing = (F.pad(counts.cumsum(0), (1, 0)), permutation, permutation.argsort())
    return (
        *(t.to(device, dtype) for t in (x, gate_up, down)),
        scores.values.softmax(-1).to(device),
        *(t.int().to(device) for t in routing),
    )


def work(case):
    slots, h, i = case["tokens"] * case["top_k"], case["hidden"], case["intermediate"]
    weights = 3 * case["experts"] * h * i
    moved = torch.finfo(case["dtype"]).bits // 8 * (weights + 2 * case["tokens"] * h)
    return moved, 6 * slots * h * i


def _combine(y, topk_weights, inverse):
    tokens, top_k = topk_weights.shape
    y = y[inverse].view(tokens, top_k, -1)
    return (y * topk_weights[..., None]).sum(1).to(y.dtype)


def eager_loop(x, gate_up, down, topk_weights, offsets, permutation, inverse):
    rows, bounds = x[permutation // topk_weights.shape[1]], offsets.tolist()
    y = torch.empty_like(rows)
    for e in range(gate_up.shape[0]):
        begin, end = bounds[e], bounds[e + 1]
        gate, up = (rows[begin:end] @ gate_up[e].T).chunk(2, dim=-1)
        torch.matmul(F.silu(gate) * up, down[e].T, out=y[begin:end])
    return _combine(y, topk_weights, inverse)


def torch_grouped_mm(x, gate_up, down, topk_weights, offsets, permutation, inverse):
    rows, ends = x[permutation // topk_weights.shape[1]], offsets[1:]
    gate, up = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    return _combine(y, topk_weights, inverse)


CONTENDERS = {
    "ours": grouped_experts,
    "eager_loop": eager_loop,
    "torch_grouped_mm": torch_grouped_mm,
}

if __name__ == "__main__":
    harness.main(__name__)

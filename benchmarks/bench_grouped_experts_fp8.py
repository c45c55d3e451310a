"""The expert half of a Mixture-of-Experts block with e4m3 weights."""

import torch

from benchmarks import harness
from mergeme_ext.ops import grouped_experts, grouped_experts_fp8, sort_by_expert

OP = "grouped_experts_fp8"
AGREEMENT = 0.1  # tokens and activations in e4m3 against bfloat16
CASES = {
    "smoke": {"tokens": 9, "experts": 4, "top_k": 2, "hidden": 200, "intermediate": 72},
    # One of DeepSeek-V3's blocks on one of 32 devices: 8 of its 256 experts.
    "deepseek-1": {"tokens": 1, "experts": 8, "top_k": 8, "hidden": 7168, "intermediate": 2048},
    "fine-1": {"tokens": 1, "experts": 64, "top_k": 8, "hidden": 1024, "intermediate": 512},
    "fine-16": {"tokens": 16, "experts": 64, "top_k": 8, "hidden": 1024, "intermediate": 512},
    "fine-512": {"tokens": 512, "experts": 64, "top_k": 8, "hidden": 1024, "intermediate": 512},
}


def weight(shape, generator):
    codes = torch.randint(0, 127, shape, generator=generator, dtype=torch.uint8)
    blocks = [-(-n // 128) for n in shape[1:]]
    scale = torch.rand(shape[0], *blocks, generator=generator) / shape[2] ** 0.5 / 100
    return (codes + 128 * (codes % 2)).view(torch.float8_e4m3fn), scale


def make(case, device):
    g = torch.Generator().manual_seed(0)
    t, e, h, i = (case[name] for name in ("tokens", "experts", "hidden", "intermediate"))
    x = torch.randn(t, h, generator=g).bfloat16()
    halves = [weight((e, i, h), g) for _ in range(2)]
    gate_up, gate_up_scale = (torch.cat(pair, 1) for pair in zip(*halves, strict=True))
    down, down_scale = weight((e, h, i), g)
    ids = torch.rand(t, e, generator=g).topk(case["top_k"]).indices.int()
    weights = torch.softmax(torch.randn(t, case["top_k"], generator=g), -1)
    routing = sort_by_expert(ids, e)
    args = (x, gate_up, gate_up_scale, down, down_scale, weights, *routing)
    return tuple(a.to(device) for a in args)


def work(case):
    t, k, e, h, i = (
        case[name] for name in ("tokens", "top_k", "experts", "hidden", "intermediate")
    )
    hit = e * (1 - (1 - k / e) ** t)  # experts that have a token, on average
    return round(3 * hit * h * i) + 4 * t * h, 6 * t * k * h * i


def dequantized(q, scale, gated=False):
    if gated:
        halves = zip(q.chunk(2, 1), scale.chunk(2, 1), strict=True)
        return torch.cat([dequantized(*half) for half in halves], 1)
    scale = scale.repeat_interleave(128, -2)[..., : q.shape[-2], :]
    return (q.float() * scale.repeat_interleave(128, -1)[..., : q.shape[-1]]).bfloat16()


def dequantize_then_grouped_experts(x, gate_up, gate_up_scale, down, down_scale, *routing):
    gate_up, down = dequantized(gate_up, gate_up_scale, gated=True), dequantized(down, down_scale)
    return grouped_experts(x, gate_up, down, *routing)


class AlreadyDequantized:
    """What twice the weights' bytes, and none of the work of taking them apart, would give."""

    key = weights = None

    def __call__(self, x, gate_up, gate_up_scale, down, down_scale, *routing):
        if self.key is not gate_up:
            gate = dequantized(gate_up, gate_up_scale, gated=True)
            self.key, self.weights = gate_up, (gate, dequantized(down, down_scale))
        return grouped_experts(x, *self.weights, *routing)


CONTENDERS = {
    "ours": grouped_experts_fp8,
    "dequantize_then_grouped_experts": dequantize_then_grouped_experts,
    "grouped_experts_in_bfloat16": AlreadyDequantized(),
}

if __name__ == "__main__":
    harness.main(__name__)

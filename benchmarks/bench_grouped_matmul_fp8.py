"""Products of one projection's experts with e4m3 weights, against dequantising them before."""

import torch

from benchmarks import harness
from mergeme_ext.ops import grouped_matmul_fp8, grouped_matmul_nt, quantize_fp8

OP = "grouped_matmul_fp8"
# name: experts E, inner K, outer N, rows M.
CASES = {
    "smoke": {"experts": 3, "inner": 200, "outer": 40, "rows": 17},
    # Decoding with experts of DeepSeek-V3's size: bound by reading the weights.
    "decode-8x7168": {"experts": 8, "inner": 7168, "outer": 2048, "rows": 8},
    "decode-64x1024": {"experts": 64, "inner": 1024, "outer": 512, "rows": 64},
    "prefill-8x1024": {"experts": 8, "inner": 1024, "outer": 512, "rows": 1024},
}


def make(case, device):
    g = torch.Generator().manual_seed(0)
    rows, experts, k, n = (case[name] for name in ("rows", "experts", "inner", "outer"))
    counts = torch.full((experts,), rows // experts)
    counts[0] += rows - counts.sum()
    offsets = torch.tensor([0, *counts.cumsum(0).tolist()], dtype=torch.int32)
    a, a_scale = quantize_fp8(torch.randn(rows, k, generator=g, dtype=torch.bfloat16))
    codes = torch.randint(0, 127, (experts, n, k), generator=g, dtype=torch.uint8)
    b = (codes + 128 * (codes % 2)).view(torch.float8_e4m3fn)
    b_scale = torch.rand(experts, -(-n // 128), -(-k // 128), generator=g) * 1e-3
    return tuple(t.to(device) for t in (a, a_scale, b, b_scale, offsets))


def work(case):
    m, k, n, e = case["rows"], case["inner"], case["outer"], case["experts"]
    return m * k + e * n * k + 2 * m * n, 2 * m * n * k


def dequantized(q, scale, rows):
    scale = scale.repeat_interleave(rows, -2)[..., : q.shape[-2], :]
    return q.float() * scale.repeat_interleave(128, -1)[..., : q.shape[-1]]


def dequantize_then_grouped_matmul(a, a_scale, b, b_scale, offsets):
    x, w = dequantized(a, a_scale, 1), dequantized(b, b_scale, 128)
    return grouped_matmul_nt(x.bfloat16(), w.bfloat16(), offsets)


CONTENDERS = {
    "ours": grouped_matmul_fp8,
    "dequantize_then_grouped_matmul": dequantize_then_grouped_matmul,
}

if __name__ == "__main__":
    harness.main(__name__)

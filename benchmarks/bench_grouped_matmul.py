"""Products of one projection's experts with tokens sorted by expert."""

import torch

from benchmarks import harness
from mergeme_ext.ops import grouped_matmul_nt

OP = "grouped_matmul"
# name: experts E, inner K, outer N, tokens times top-k M.
CASES = {
    "smoke": {"experts": 3, "inner": 24, "outer": 40, "rows": 17, "dtype": torch.float32},
    # The up projection of a fine-grained MoE block: 64 experts of 1024 x 512, top-8, 512 tokens.
    "fine-64x512": {
        "experts": 64,
        "inner": 1024,
        "outer": 512,
        "rows": 4096,
        "dtype": torch.bfloat16,
    },
    # Eight experts of a 135M model's size, top-2, 512 tokens.
    "small-8x1024": {
        "experts": 8,
        "inner": 1024,
        "outer": 512,
        "rows": 1024,
        "dtype": torch.float32,
    },
    "small-8x1024-bf16": {
        "experts": 8,
        "inner": 1024,
        "outer": 512,
        "rows": 1024,
        "dtype": torch.bfloat16,
    },
    # Decoding: two rows for each of eight experts; bound by reading the weights.
    "decode-8x1024-bf16": {
        "experts": 8,
        "inner": 1024,
        "outer": 512,
        "rows": 16,
        "dtype": torch.bfloat16,
    },
}


def make(case, device):
    g = torch.Generator().manual_seed(0)
    cuts = torch.randint(0, case["rows"] + 1, (case["experts"] - 1,), generator=g).sort().values
    offsets = torch.tensor([0, *cuts.tolist(), case["rows"]], dtype=torch.int32)
    a = torch.randn(case["rows"], case["inner"], generator=g)
    b = torch.randn(case["experts"], case["outer"], case["inner"], generator=g)
    return a.to(device, case["dtype"]), b.to(device, case["dtype"]), offsets.to(device)


def work(case):
    m, k, n, e = case["rows"], case["inner"], case["outer"], case["experts"]
    moved = torch.finfo(case["dtype"]).bits // 8 * (m * k + e * n * k + m * n)
    return moved, 2 * m * n * k


def eager_loop(a, b, offsets):
    out = a.new_empty(a.shape[0], b.shape[1])
    bounds = offsets.tolist()
    for e in range(b.shape[0]):
        begin, end = bounds[e], bounds[e + 1]
        torch.matmul(a[begin:end], b[e].T, out=out[begin:end])
    return out


def torch_grouped_mm(a, b, offsets):
    return torch.nn.functional.grouped_mm(a, b.transpose(1, 2), offs=offsets[1:])


CONTENDERS = {
    "ours": grouped_matmul_nt,
    "eager_loop": eager_loop,
    "torch_grouped_mm": torch_grouped_mm,
}

if __name__ == "__main__":
    harness.main(__name__)

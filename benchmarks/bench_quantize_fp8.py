"""Activations to e4m3 with a scale for each 128 of a row."""

import torch

from benchmarks import harness
from mergeme_ext.ops import quantize_fp8

OP = "quantize_fp8"
CASES = {
    "smoke": {"rows": 3, "columns": 200, "dtype": torch.float32},
    # Tokens of a DeepSeek-V3 block.
    "512x7168-bf16": {"rows": 512, "columns": 7168, "dtype": torch.bfloat16},
}


def make(case, device):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(case["rows"], case["columns"], generator=g)
    return (x.to(device, case["dtype"]),)


def work(case):
    elements = case["rows"] * case["columns"]
    return elements * (torch.finfo(case["dtype"]).bits // 8 + 1) + elements // 32, 2 * elements


def eager(x):
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -columns % 128)).view(rows, -1, 128)
    size = padded.abs().amax(-1)
    scale = torch.where(size == 0, 1.0, size / 448)
    q = (padded / scale[..., None]).view(rows, -1)[:, :columns]
    return q.to(torch.float8_e4m3fn), scale


CONTENDERS = {"ours": quantize_fp8, "eager": eager}

if __name__ == "__main__":
    harness.main(__name__)

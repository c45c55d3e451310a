"""The search for a NaN or an infinity in a sound tensor against torch's isfinite."""

import torch

import mergeme_ext
from benchmarks import harness

__all__ = ["CASES", "CONTENDERS", "OP", "make", "work"]

OP = "first_nonfinite"
# One chunk of the merge engine, and a 7B model's query projection (LLaMA) as a whole.
CASES = {
    "smoke": {"numel": 4096, "dtype": torch.bfloat16},
    "chunk": {"numel": 2**20, "dtype": torch.bfloat16},
    "llama7b_q_proj": {"numel": 4096 * 4096, "dtype": torch.bfloat16},
    "llama7b_q_proj_float32": {"numel": 4096 * 4096, "dtype": torch.float32},
}


def make(case, device):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(case["numel"], generator=generator).to(device, case["dtype"]),)


def work(case):
    return case["numel"] * case["dtype"].itemsize, case["numel"]


def _eager(tensor):
    bad = tensor.isfinite().logical_not_()
    return torch.where(bad.any(), bad.to(torch.uint8).argmax(), -1)


CONTENDERS = {"mergeme": mergeme_ext.first_nonfinite, "eager": _eager}

if __name__ == "__main__":
    harness.main(__name__)

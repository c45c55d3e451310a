"""Inputs and byte counts that the benches of the merge ops share."""

import torch

# Shapes of one weight: a 7B model's query and gate projections (LLaMA), M fine-tuned models of it.
CASES = {
    "smoke": {"shape": (64, 64), "models": 2, "dtype": torch.bfloat16},
    "llama7b_q_proj_3": {"shape": (4096, 4096), "models": 3, "dtype": torch.bfloat16},
    "llama7b_q_proj_3_float32": {"shape": (4096, 4096), "models": 3, "dtype": torch.float32},
    "llama7b_gate_proj_8": {"shape": (11008, 4096), "models": 8, "dtype": torch.bfloat16},
}
DENSITY = 0.2


def numel(case) -> int:
    return case["shape"][0] * case["shape"][1]


def make_weights(case, device):
    """A base and fine-tuned weights whose deltas are small beside it, as real ones are."""
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(case["shape"], generator=generator)
    tuned = [
        base + 0.002 * torch.randn(case["shape"], generator=generator)
        for _ in range(case["models"])
    ]
    return base.to(device, case["dtype"]), [t.to(device, case["dtype"]) for t in tuned]


def bytes_read(case, *, with_base: bool = True) -> int:
    return (case["models"] + with_base) * numel(case) * case["dtype"].itemsize


def bytes_written(case) -> int:
    return numel(case) * case["dtype"].itemsize

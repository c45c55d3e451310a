"""The expert half of a Mixture-of-Experts block on packed weights."""

import torch

from benchmarks import bench_grouped_experts as unpacked
from benchmarks import harness
from mergeme_ext.ops import grouped_experts, pack_experts, packed_experts

OP = "packed_experts"
CASES = {
    "smoke": unpacked.CASES["smoke"],
    "fine-1-bf16": unpacked.CASES["fine-512-bf16"] | {"tokens": 1},
    "fine-16-bf16": unpacked.CASES["fine-512-bf16"] | {"tokens": 16},
    "fine-512-bf16": unpacked.CASES["fine-512-bf16"],
    "fine-512": unpacked.CASES["fine-512-bf16"] | {"dtype": torch.float32},
}


def make(case, device):
    x, gate_up, down, *routing = unpacked.make(case, device)
    packed = (pack_experts(gate_up, gated=True), pack_experts(down))
    return x, gate_up, down, packed, routing, case["intermediate"]


def work(case):
    return unpacked.work(case)


CONTENDERS = {
    "ours": lambda x, gate_up, down, packed, routing, intermediate: packed_experts(
        x, *packed, *routing, intermediate=intermediate
    ),
    "ours_unpacked": lambda x, gate_up, down, packed, routing, intermediate: grouped_experts(
        x, gate_up, down, *routing
    ),
}

if __name__ == "__main__":
    harness.main(__name__)

"""float64 reference: one slot at a time."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "silu": lambda g: g / (1 + (-g).exp()),
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
}


def grouped_experts(
    x, gate_up, down, topk_weights, expert_offsets, permutation, inverse, activation="silu"
):
    x, gate_up, down, topk_weights = (
        t.detach().double().cpu() for t in (x, gate_up, down, topk_weights)
    )
    top_k, intermediate = topk_weights.shape[1], down.shape[2]
    out, act = torch.zeros_like(x), ACTIVATIONS[activation]
    for e in range(gate_up.shape[0]):
        for position in range(expert_offsets[e], expert_offsets[e + 1]):
            slot = int(permutation[position])
            token, k = slot // top_k, slot % top_k
            both = gate_up[e] @ x[token]
            gate, up = both[:intermediate], both[intermediate:]
            out[token] += topk_weights[token, k] * (down[e] @ (act(gate) * up))
    return out

"""float64 reference: one slot at a time."""

import torch


def grouped_experts(x, gate_up, down, topk_weights, expert_offsets, permutation, inverse):
    x, gate_up, down, topk_weights = (
        t.detach().double().cpu() for t in (x, gate_up, down, topk_weights)
    )
    top_k, intermediate = topk_weights.shape[1], down.shape[2]
    out = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        for position in range(expert_offsets[e], expert_offsets[e + 1]):
            slot = int(permutation[position])
            token, k = slot // top_k, slot % top_k
            both = gate_up[e] @ x[token]
            gate, up = both[:intermediate], both[intermediate:]
            out[token] += topk_weights[token, k] * (down[e] @ (gate / (1 + (-gate).exp()) * up))
    return out

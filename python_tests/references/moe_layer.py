"""A Mixture-of-Experts layer in float64, one token and one expert at a time."""

import torch


def gate(logits, top_k):
    """Softmax over all experts, the ``top_k`` largest, ties to the lower index, renormalised."""
    ids, weights = [], []
    for row in logits.double():
        p = (row - row.max()).exp()
        order = sorted(range(len(row)), key=lambda e, p=p: (-p[e].item(), e))[:top_k]
        ids.append(order)
        weights.append(p[order] / p[order].sum())
    return ids, weights


def expert(x, gate_up, down):
    g, u = (gate_up.double() @ x).chunk(2)
    return down.double() @ (g / (1 + torch.exp(-g)) * u)


def moe_layer(x, logits, gate_up, down, top_k):
    """x [T, H], logits [T, E], gate_up [E, 2I, H], down [E, H, I] -> [T, H] float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t, (ids, weights) in enumerate(zip(*gate(logits, top_k), strict=True)):
        for e, w in zip(ids, weights, strict=True):
            out[t] += w * expert(x[t].double(), gate_up[e], down[e])
    return out

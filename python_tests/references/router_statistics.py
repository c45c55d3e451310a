"""float64 reference: plain loops over tokens and experts."""

import math

import torch


def router_statistics(logits, topk_ids, mask=None):
    """(counts, probability sums, sum of lse^2); the last two also with their tokens' terms."""
    num_experts = logits.shape[1]
    counts = [0] * num_experts
    sums = [0.0] * num_experts
    squares = 0.0
    rows = logits.detach().double().cpu().tolist()
    for t, (row, ids) in enumerate(zip(rows, topk_ids.tolist(), strict=True)):
        if mask is not None and not mask[t]:
            continue
        for expert in ids:
            counts[expert] += 1
        top = max(row)
        total = sum(math.exp(z - top) for z in row)
        for e, z in enumerate(row):
            sums[e] += math.exp(z - top) / total
        squares += (top + math.log(total)) ** 2
    wide = {"dtype": torch.float64}
    return torch.tensor(counts), torch.tensor(sums, **wide), torch.tensor(squares, **wide)

"""Reference: a bucket for each expert, filled in slot order."""

import torch


def sort_by_expert(topk_ids, num_experts):
    buckets = [[] for _ in range(num_experts)]
    for slot, expert in enumerate(topk_ids.flatten().tolist()):
        buckets[expert].append(slot)
    permutation = [slot for bucket in buckets for slot in bucket]
    offsets = [0]
    for bucket in buckets:
        offsets.append(offsets[-1] + len(bucket))
    inverse = [0] * len(permutation)
    for position, slot in enumerate(permutation):
        inverse[slot] = position
    return tuple(torch.tensor(x, dtype=torch.int32) for x in (offsets, permutation, inverse))

"""Reference: a bucket for each expert, filled in slot order."""

import math

import torch


def sort_by_expert(topk_ids, num_experts, capacity=None, priority=None):
    """Ids equal to ``num_experts`` are sentinels."""
    buckets = [[] for _ in range(num_experts)]
    for slot, expert in enumerate(topk_ids.flatten().tolist()):
        if expert < num_experts:
            buckets[expert].append(slot)
    if capacity is not None:
        keys = [0.0] * topk_ids.numel() if priority is None else priority.flatten().tolist()
        for bucket in buckets:  # sorted() is stable, and NaN goes first
            bucket.sort(key=lambda slot: (not math.isnan(keys[slot]), -keys[slot]))
            del bucket[capacity:]
            bucket.sort()
    permutation = [slot for bucket in buckets for slot in bucket]
    permutation += sorted(set(range(topk_ids.numel())) - set(permutation))
    offsets = [0]
    for bucket in buckets:
        offsets.append(offsets[-1] + len(bucket))
    inverse = [0] * len(permutation)
    for position, slot in enumerate(permutation):
        inverse[slot] = position
    return tuple(torch.tensor(x, dtype=torch.int32) for x in (offsets, permutation, inverse))

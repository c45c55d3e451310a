"""float64 reference: plain loops over tokens and experts."""

import math

import torch


def _exp(x):
    return math.exp(x) if x > -745 else 0.0


def _softmax(z):
    top = max(z)
    total = sum(_exp(x - top) for x in z)
    return [_exp(x - top) / total for x in z]


def _softplus(x):
    return max(x, 0.0) + math.log1p(_exp(-abs(x)))


def _scores(z, score):
    if score == "softmax":
        return _softmax(z)
    if score == "none":
        return z
    if score == "sqrtsoftplus":
        return [math.sqrt(_softplus(x)) for x in z]
    return [1 / (1 + _exp(-x)) if x >= 0 else _exp(x) / (1 + _exp(x)) for x in z]


def selection_scores(logits, bias, score):
    """float64 [T, E]: what the choice compares; without a bias the logits, which order alike."""
    if bias is None:
        return logits.detach().double().cpu()
    rows = [_scores(z, score) for z in logits.detach().double().cpu().tolist()]
    return torch.tensor(rows, dtype=torch.float64).view(logits.shape) + bias.double().cpu()


def select(keys, top_k):
    """The top_k largest of every row, in descending order; of equal ones the lower index first."""
    ids = [sorted(range(len(k)), key=lambda e, k=k: (-k[e], e))[:top_k] for k in keys.tolist()]
    return torch.tensor(ids, dtype=torch.int32).view(len(keys), top_k)


def scores(logits, score):
    """float64 [T, E]: the scores, without bias."""
    rows = [_scores(z, score) for z in logits.detach().double().cpu().tolist()]
    return torch.tensor(rows, dtype=torch.float64).view(logits.shape)


def group_scores(scores, num_groups, group_score):
    """float64 [T, G]: the largest of a group's scores, or the sum of its two largest."""
    taken = 1 if group_score == "max" else 2
    rows = []
    for row in scores.tolist():
        size = len(row) // num_groups
        groups = [row[g * size : (g + 1) * size] for g in range(num_groups)]
        rows.append([sum(sorted(group, reverse=True)[:taken]) for group in groups])
    return torch.tensor(rows, dtype=torch.float64).view(len(scores), num_groups)


def open_experts(groups, num_groups, num_experts):
    """Bool [T, E]: which experts lie in the ``groups`` [T, top_groups] of their row, of G."""
    mask = torch.zeros(len(groups), num_experts, dtype=torch.bool)
    size = num_experts // num_groups
    for row, chosen in zip(mask, groups.tolist(), strict=True):
        for g in chosen:
            row[g * size : (g + 1) * size] = True
    return mask


def gate_weights(logits, ids, score, renormalize, scale):
    """float64 [T, K]: the weights of the experts ``ids``."""
    weights = []
    for z, chosen in zip(logits.detach().double().cpu().tolist(), ids.tolist(), strict=True):
        picked = [z[e] for e in chosen]
        if not renormalize:
            scores = _scores(z, score)
            row = [scores[e] for e in chosen]
        elif score == "softmax":
            row = _softmax(picked)
        elif score == "none":
            row = [x / sum(picked) for x in picked]
        elif score == "sqrtsoftplus":  # by logarithms; softplus(x) is exp(x) where x is very low
            row = _softmax([0.5 * (math.log(_softplus(x)) if x > -700 else x) for x in picked])
        else:  # by logarithms of sigmoids, whose ratios exist where the scores underflow
            row = _softmax([min(x, 0.0) - math.log1p(_exp(-abs(x))) for x in picked])
        weights.append([scale * w for w in row])
    return torch.tensor(weights, dtype=torch.float64).view(ids.shape)

"""float64 reference: plain loops over tokens and experts."""

import math

import torch


def _exp(x):
    return math.exp(x) if x > -745 else 0.0


def _softmax(z):
    top = max(z)
    total = sum(_exp(x - top) for x in z)
    return [_exp(x - top) / total for x in z]


def _scores(z, score):
    if score == "softmax":
        return _softmax(z)
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
        else:  # by logarithms of sigmoids, whose ratios exist where the scores underflow
            row = _softmax([min(x, 0.0) - math.log1p(_exp(-abs(x))) for x in picked])
        weights.append([scale * w for w in row])
    return torch.tensor(weights, dtype=torch.float64).view(ids.shape)

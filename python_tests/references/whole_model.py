"""float64 references of the methods that look at a whole model: on flat vectors, whole and sorted.

``work`` is the dtype of the arithmetic; in float32 they are the eager code to compare errors with.
"""

import math

import torch


def original_ties(base, tensors, density, work=torch.float64):
    """TIES as its authors' code does it: one vector per model, no weights."""
    base = base.to(work)
    deltas = [t.to(work) - base for t in tensors]
    n = base.numel()
    trimmed = []
    for d in deltas:
        keep = min(n, int(n * density) + 1)
        least = sorted((abs(x) for x in d.tolist()), reverse=True)[keep - 1]
        trimmed.append([x if abs(x) >= least else 0.0 for x in d.tolist()])
    sums = [sum(column) for column in zip(*trimmed, strict=True)]
    majority = 1 if sum((s > 0) - (s < 0) for s in sums) > 0 else -1
    out, size = [], []
    for i, s in enumerate(sums):
        sign = (s > 0) - (s < 0) or majority
        agreeing = [d[i] for d in trimmed if d[i] * sign > 0]
        mean = sum(agreeing) / max(1, len(agreeing))
        out.append(base[i].item() + mean)
        size.append(abs(base[i].item()) + abs(mean))
    return out, size


def unify(deltas):
    total = sum(deltas)
    sign = torch.where(total > 0, 1.0, -1.0).to(total.dtype)
    masks = [d * sign > 0 for d in deltas]
    return sign * torch.stack([(d * m).abs() for d, m in zip(deltas, masks, strict=True)]).amax(
        0
    ), masks


def emr_factor(model, task, rescale_stat):
    """``model``: by name, base and tuned weights."""
    own = masked = 0.0
    for base, tensors in model.values():
        if base.numel() == 0:
            continue
        deltas = [t.double() - base.double() for t in tensors]
        unified, masks = unify(deltas)
        by = base.numel() if rescale_stat == "mean_of_means" else 1
        own += deltas[task].abs().sum().item() / by
        masked += (unified * masks[task]).abs().sum().item() / by
    return own / masked if masked else 0.0


def pcb(base, tensors, *, density, clip, inter, weights, lam, work=torch.float64):
    base = base.to(work)
    d = torch.stack([t.to(work) - base for t in tensors])
    count, n = d.shape

    def normalized(x):
        low, high = x.min(1, keepdim=True)[0], x.max(1, keepdim=True)[0]
        return torch.where(high > low, (x - low) / (high - low), 0)

    order = d.abs().sort(1)[0]
    low, high = order[:, int(n * clip)], order[:, int(n * (1 - clip) - 1)]
    size = d.abs().clamp(low[:, None], high[:, None])
    normal = normalized(size)
    intra = (count * normal**2).exp()
    other = d.sum(0) if inter == "sum" else (d.sign() * normal).sum(0)
    score = intra * (d * other).tanh()
    begin = score.sort(1)[0][torch.arange(count), torch.tensor([int(n * (1 - p)) for p in density])]
    share = normalized(score.maximum(begin[:, None]))
    w = torch.tensor(weights, dtype=work)[:, None]
    merged = (w * d.sign() * size * share).sum(0) / share.sum(0).clamp(min=1e-12)
    return base + lam * merged


def fisher(tensors, fishers, weights, f0, norms=None):
    """Norms of the models' whole Fishers, or None for no normalization."""
    if norms is not None:
        shares = [1 / (n + f0) for n in norms]
        weights = [w * s / sum(shares) for w, s in zip(weights, shares, strict=True)]
    scales = [w * (f.double() + f0) for w, f in zip(weights, fishers, strict=True)]
    above = sum(s * t.double() for s, t in zip(scales, tensors, strict=True))
    return above / sum(scales)


def fisher_norm(fishers):
    return math.sqrt(math.fsum((f.double() ** 2).sum().item() for f in fishers))


def regmean(tensors, grams, ratio, ridge):
    """As on paper: an inverse of the sum of the damped Grams."""
    grams = [g.double() for g in grams]
    size = grams[0].shape[0]
    added = ridge * sum(g.diagonal().mean() for g in grams) / len(grams)
    damped = [
        ratio * g + (1 - ratio) * g.diagonal().diag() + added * torch.eye(size).double()
        for g in grams
    ]
    right = sum(g @ t.double().t() for g, t in zip(damped, tensors, strict=True))
    return (sum(damped).inverse() @ right).t()

"""float64 merge of task vectors, one expression per step."""

import torch


def merge_task_vectors(base, tensors, weights, scales, kept, *, elect, normalize, lam):
    """``kept`` is a boolean mask ``[M, *base]``.

    Returns the value, the sum of absolute terms behind it, and where an election was so close that
    rounding may decide it otherwise.
    """
    b = base.detach().double().cpu()
    shape = (-1, *[1] * b.dim())
    w = weights.double().cpu().view(shape)
    x = torch.stack([t.detach().double().cpu() for t in tensors]) - b
    v = w * scales.double().cpu().view(shape) * torch.where(kept, x, 0.0)
    close = torch.zeros_like(b, dtype=torch.bool)
    agree = torch.ones_like(v, dtype=torch.bool)
    if elect != "none":
        votes = {"sum": v, "count": v.sign(), "unweighted": torch.where(kept, x, 0.0)}[elect]
        total = votes.sum(0)
        agree = v.sign() == torch.where(total >= 0, 1.0, -1.0)
        close = (total != 0) & (total.abs() < 1e-5 * votes.abs().sum(0))
    mix = torch.where(agree, v, 0.0).sum(0)
    size = torch.where(agree, v, 0.0).abs().sum(0)
    if normalize:
        by = torch.where(agree, w, 0.0).sum(0)
        by = torch.where(by.abs() < (1e-8 if elect == "none" else 1e-300), 1.0, by)
        cancelled = torch.where(agree, w, 0.0).abs().sum(0) / by.abs()
        mix, size = mix / by, size / by.abs() * cancelled.clamp(min=1.0)
    return b + lam * mix, b.abs() + abs(lam) * size, close

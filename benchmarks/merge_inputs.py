"""Models as a merge meets them: small changes of one base."""

import torch


def models(case, device):
    """Base and ``case["models"]`` tensors around it, with a fine-tune's small changes."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(case["shape"], generator=generator) * 0.02
    tensors = [
        base + torch.randn(case["shape"], generator=generator) * 0.002
        for _ in range(case["models"])
    ]
    return base.to(case["dtype"]).to(device), [t.to(case["dtype"]).to(device) for t in tensors]

"""Inputs for the merge ops: a base and models near it, in every layout an op must take."""

import torch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def models(shape, dtype, num_models=3, seed=0, device="cpu"):
    """Base and models: mixed signs, some elements equal to the base, one model spread wide."""
    g = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(shape, generator=g, dtype=torch.float64)

    base = normal()
    tensors = []
    for m in range(num_models):
        delta = normal() * (torch.rand(shape, generator=g) < 0.7)
        if m == 1:
            delta *= torch.pow(10.0, torch.randint(-4, 2, shape, generator=g))
        tensors.append((base + delta).to(dtype).to(device))
    return base.to(dtype).to(device), tensors


def transposed(t):
    """Equal to ``t``, of two dimensions, but not contiguous."""
    return t.t().contiguous().t()


def misaligned(t):
    """Equal to ``t``, starting one element past an aligned address."""
    out = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape)
    return out.copy_(t)


# The worked examples' toy data (float64), and MergeME's.
TOY_BASE = [1.0, -2.0, 0.5, 0.0, 3.0, -1.0]
TOY_DELTAS = [
    [0.5, -0.125, 0.0, 0.75, -0.625, 0.0625],
    [-0.25, -0.375, 1.0, 0.125, -0.5, 0.0],
    [0.125, 0.625, 0.25, -0.75, 0.375, -0.0625],
]
MERGEME_BASE = [1.0, -2.0, 0.5, 3.0, 0.0]
MERGEME_EXPERTS = [
    [1.30, -2.60, 0.52, 3.40, -0.10],
    [0.80, -2.20, 0.90, 3.05, 0.25],
    [1.40, -1.60, 0.45, 2.80, 0.20],
]


def toy(dtype=torch.float64):
    base = torch.tensor(TOY_BASE, dtype=dtype)
    return base, [base + torch.tensor(d, dtype=dtype) for d in TOY_DELTAS]


def mergeme(dtype=torch.float64):
    return torch.tensor(MERGEME_BASE, dtype=dtype), [
        torch.tensor(e, dtype=dtype) for e in MERGEME_EXPERTS
    ]


# At p = 0.5 the first six elements of models 0, 1, 2 have the masks 101100, 011010, 110001; found
# by trying keys in turn with references/philox.py.
TOY_KEY = 2177342782468702542
# The same for p = 0.8, five elements and the masks 11011, 10111, 01111.
MERGEME_KEY = 4294968007

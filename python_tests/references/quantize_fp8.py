"""Block-wise quantisation by definition: of all e4m3 numbers the nearest is taken."""

import torch

BLOCK = 128
# The finite e4m3 numbers that are not negative, by their code: ascending.
NUMBERS = torch.tensor(
    [
        m * 2.0**-9 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
        for e in range(16)
        for m in range(8)
        if (e, m) != (15, 7)
    ],
    dtype=torch.float64,
)


def encode(x):
    """Codes of the nearest e4m3 numbers, the even code of two as near; NaN where not finite."""
    size = x.double().abs().clamp(max=448)
    above = torch.searchsorted(NUMBERS, size.contiguous()).clamp(max=len(NUMBERS) - 1)
    below = (above - 1).clamp(min=0)
    to_above, to_below = NUMBERS[above] - size, size - NUMBERS[below]
    take_below = (to_below < to_above) | ((to_below == to_above) & (below % 2 == 0))
    code = torch.where(take_below, below, above)
    code = torch.where(x.isfinite(), code, 0x7F)
    return (code + 0x80 * x.signbit()).to(torch.uint8)


def quantize_fp8(x):
    x = x.detach().float().cpu()
    rows, columns = x.shape
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    scale = torch.zeros(rows, -(-columns // BLOCK))
    for b, block in enumerate(x.split(BLOCK, dim=1) if columns else ()):
        size = torch.where(block.isfinite(), block.abs(), 0).amax(1)
        s = (size / 448).clamp(min=torch.finfo(torch.float32).tiny)
        scale[:, b] = torch.where(size == 0, 1.0, s)
        codes[:, b * BLOCK : (b + 1) * BLOCK] = encode(block / scale[:, b, None])
    return codes.view(torch.float8_e4m3fn), scale


def dequantize(q, scale, rows=1):
    """float64 of ``q [..., N, K]`` with a scale for each block of ``rows`` x 128."""
    scale = scale.detach().double().cpu()
    n, k = q.shape[-2:]
    scale = scale.repeat_interleave(rows, -2)[..., :n, :]
    return q.detach().double().cpu() * scale.repeat_interleave(BLOCK, -1)[..., :k]

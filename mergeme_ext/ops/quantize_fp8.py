"""Block-wise quantisation of activations to 8-bit floating point."""

import torch
from torch import Tensor

__all__ = ["quantize_fp8"]

BLOCK = 128


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``x`` in e4m3 with one float32 scale for each 128 neighbours of a row.

    A block's scale is its largest magnitude divided by 448, the largest e4m3 number, and its
    numbers are ``x / scale`` rounded to the nearest, ties to even: ``x`` is about
    ``q * scale``, to 1/16 of its size, or to 1/1024 of the scale where that is more.

    Args:
        x: ``[S, K]`` float32, bfloat16 or float16. The last block of a row may be smaller.

    Returns:
        ``(q, scale)``: float8_e4m3fn ``[S, K]`` and float32 ``[S, ceil(K / 128)]``, new and
        contiguous. The scale of a block of zeros is 1, and none is below 2^-126, so that it is a
        normal number. NaN and infinities, which e4m3 lacks, become NaN and count for no scale. The
        same bits on every device.

    Raises:
        TypeError: ``x`` is not of one of these dtypes.
        ValueError: ``x`` is not a matrix.
        NotImplementedError: A gradient is asked for.

    Source: DeepSeek-V3, DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.2 (1x128 tiles).
    """
    return torch.ops.mergeme.quantize_fp8.default(x)


def _fake(x):
    rows, columns = x.shape
    q = x.new_empty(rows, columns, dtype=torch.float8_e4m3fn)
    return q, x.new_empty(rows, (columns + BLOCK - 1) // BLOCK, dtype=torch.float32)


def _backward(ctx, *grads):
    raise NotImplementedError("mergeme::quantize_fp8 has no gradient: rounding is a step function")


def register(namespace: str) -> None:
    """Give the op of ``namespace`` its fake, and a gradient that raises."""
    name = f"{namespace}::quantize_fp8"
    torch.library.register_fake(name, _fake)
    torch.library.register_autograd(name, _backward)


register("mergeme")

"""Grouped matrix products of 8-bit floating-point operands with scales of blocks."""

import torch
from torch import Tensor

__all__ = ["grouped_matmul_fp8"]


def grouped_matmul_fp8(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    expert_offsets: Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Return, for each expert's rows of ``a``, their product with that expert's ``b`` transposed.

    What the operands stand for is e4m3 times the scale of the number's block: for ``a`` of 128
    neighbours in a row, as :func:`quantize_fp8` makes them, for ``b`` of 128 x 128, as DeepSeek-V3
    checkpoints hold them (``weight`` and ``weight_scale_inv``).

    Args:
        a: float8_e4m3fn ``[M, K]``; rows sorted by expert.
        a_scale: float32 ``[M, ceil(K / 128)]``.
        b: float8_e4m3fn ``[E, N, K]``, E >= 1.
        b_scale: float32 ``[E, ceil(N / 128), ceil(K / 128)]``.
        expert_offsets: int32 ``[E + 1]``, non-decreasing from 0 to at most M; equal neighbours make
            an empty group. Rows from the last offset on belong to no expert.
        dtype: Of the result: bfloat16, float16 or float32.

    Returns:
        A new contiguous ``[M, N]``, zero in the rows of no expert. Each block of 128 k is summed in
        float32 by itself and added times both scales, in float32; the result is rounded once.

    Raises:
        TypeError: A dtype is not the documented one.
        ValueError: A shape or device does not match, or (CPU; on CUDA the kernel asserts)
            ``expert_offsets`` does not run from 0 to at most M without decreasing.
        NotImplementedError: A gradient is asked for.

    Source: DeepSeek-V3, DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.2 (scales of blocks,
    partial sums promoted to float32 every 128 k).
    """
    return torch.ops.mergeme.grouped_matmul_fp8.default(
        a, a_scale, b, b_scale, expert_offsets, dtype=dtype
    )


def _fake(a, a_scale, b, b_scale, expert_offsets, *, dtype):
    return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)


def _backward(ctx, grad):
    raise NotImplementedError(
        "mergeme::grouped_matmul_fp8: e4m3 weights are for inference; to train, dequantise them "
        "and use grouped_matmul_nt"
    )


def register(namespace: str) -> None:
    """Give the op of ``namespace`` its fake, and a gradient that raises."""
    name = f"{namespace}::grouped_matmul_fp8"
    torch.library.register_fake(name, _fake)
    torch.library.register_autograd(name, _backward)


register("mergeme")

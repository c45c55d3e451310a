"""The fused expert MLP with 8-bit floating-point weights that have scales of blocks."""

import torch
from torch import Tensor

__all__ = ["grouped_experts_fp8"]


def grouped_experts_fp8(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    topk_weights: Tensor,
    expert_offsets: Tensor,
    permutation: Tensor,
    inverse: Tensor,
    *,
    activation: str = "silu",
) -> Tensor:
    """Return, for each token, the weighted sum of its experts' outputs, computed in e4m3.

    As :func:`grouped_experts`, with the weights of DeepSeek-V3's checkpoints: e4m3, a scale
    (``weight_scale_inv``) for each 128 x 128 of them. Tokens, and activations between the two
    products, are quantised as :func:`quantize_fp8` does.

    Args:
        x: Tokens ``[T, H]``, float32, bfloat16 or float16.
        gate_up: float8_e4m3fn ``[E, 2I, H]``, E >= 1: each expert's gate rows, then its up rows.
        gate_up_scale: float32 ``[E, 2 * ceil(I / 128), ceil(H / 128)]``: the scales of the gate
            rows, then those of the up rows. The last block of each may be smaller; none is of gate
            and up at once.
        down: float8_e4m3fn ``[E, H, I]``.
        down_scale: float32 ``[E, ceil(H / 128), ceil(I / 128)]``.
        topk_weights: float32 ``[T, K]``.
        expert_offsets: int32 ``[E + 1]``, as from :func:`sort_by_expert`.
        permutation: int32 ``[T * K]``, the slot of each row.
        inverse: int32 ``[T * K]``, the row of each slot.
        activation: "silu", "gelu" or "gelu_tanh".

    Returns:
        A new contiguous ``[T, H]`` of ``x``'s dtype. Products are summed in float32, within blocks
        of 128 and over them, activations are kept in float32 until they are quantised, and the
        weighted sum over k, in order, is rounded once. Slots from ``expert_offsets[E]`` on
        contribute nothing.

    Raises:
        TypeError: A dtype is not the documented one.
        ValueError: A shape or device does not match; among them scales counted over the 2I rows
            where a block would hold the end of gate and the start of up.
        IndexError: ``permutation`` or ``inverse`` is out of range (CPU; on CUDA the kernel
            asserts).
        NotImplementedError: A gradient is asked for.

    Source: DeepSeek-V3, DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.
    """
    return torch.ops.mergeme.grouped_experts_fp8.default(
        x,
        gate_up,
        gate_up_scale,
        down,
        down_scale,
        topk_weights,
        expert_offsets,
        permutation,
        inverse,
        activation=activation,
    )


def _fake(
    x,
    gate_up,
    gate_up_scale,
    down,
    down_scale,
    topk_weights,
    expert_offsets,
    permutation,
    inverse,
    *,
    activation="silu",
):
    return x.new_empty(x.shape)


def _backward(ctx, grad):
    raise NotImplementedError(
        "mergeme::grouped_experts_fp8: e4m3 weights are for inference; to train, dequantise them "
        "and use grouped_experts"
    )


def register(namespace: str) -> None:
    """Give the op of ``namespace`` its fake, and a gradient that raises."""
    name = f"{namespace}::grouped_experts_fp8"
    torch.library.register_fake(name, _fake)
    torch.library.register_autograd(name, _backward)


register("mergeme")

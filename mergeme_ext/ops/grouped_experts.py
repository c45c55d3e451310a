"""The expert MLPs of a Mixture-of-Experts block: gather, gate and up, SwiGLU, down, combine."""

import torch
from torch import Tensor

__all__ = ["grouped_experts"]


def grouped_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    expert_offsets: Tensor,
    permutation: Tensor,
    inverse: Tensor,
) -> Tensor:
    """Return, for every token of ``x``, the sum of its experts' outputs times ``topk_weights``.

    ``out[t] = sum over k of topk_weights[t, k] * down[e] (silu(gate[e] x[t]) * (up[e] x[t]))`` with
    ``e`` the expert of slot ``t * K + k`` and ``gate, up = gate_up.chunk(2, dim=1)``. The routing
    comes from :func:`sort_by_expert`.

    Args:
        x: ``[T, H]``; the tokens, in their own order.
        gate_up: ``[E, 2I, H]``, E >= 1, dtype of ``x``; each expert's I gate rows, then its I up
            rows (the in-memory layout of transformers).
        down: ``[E, H, I]``, dtype of ``x``.
        topk_weights: ``[T, K]`` float32 (float64 for float64 ``x``); any values, K >= 0.
        expert_offsets: int32 ``[E + 1]``, non-decreasing from 0 to T * K.
        permutation: int32 ``[T * K]``; sorted position to slot.
        inverse: int32 ``[T * K]``; slot to sorted position.

    Returns:
        A new contiguous ``[T, H]`` of ``x``'s dtype. Products and the sum over k, in ascending k,
        are formed in float32 (float64 for float64 inputs). Rounded to the dtype are only the
        activations between the two products, and the result.

    Raises:
        TypeError: A dtype is not the documented one.
        ValueError: A shape or device does not match, or (CPU; on CUDA the kernel asserts)
            ``expert_offsets`` does not run from 0 to T * K without decreasing.
        IndexError: ``permutation`` or ``inverse`` leaves ``[0, T * K)`` (CPU; on CUDA the kernel
            asserts).

    Gradient: ``x``, ``gate_up``, ``down`` and ``topk_weights``. Nothing but the inputs is kept for
    it; gate and up are computed again.

    Source: SwiGLU experts, Shazeer 2020, arXiv:2002.05202, in the sparsely gated sum of Shazeer et
    al. 2017, arXiv:1701.06538, equation 1; the gather fused into the first product follows
    ScatterMoE, Tan et al. 2024, arXiv:2403.08245.
    """
    return torch.ops.mergeme.grouped_experts.default(
        x, gate_up, down, topk_weights, expert_offsets, permutation, inverse
    )


def _fake(x, gate_up, down, topk_weights, expert_offsets, permutation, inverse):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def register(namespace: str) -> None:
    """Give the op of ``namespace`` its fake and gradient."""
    ops = getattr(torch.ops, namespace)

    def backward(ctx, grad):
        x, gate_up, down, topk_weights, offsets, permutation, inverse = ctx.saved_tensors
        need_x, need_gate_up, need_down, need_weights = ctx.needs_input_grad[:4]
        (num_tokens, top_k), dtype, acc = topk_weights.shape, x.dtype, topk_weights.dtype
        token = permutation // max(top_k, 1)
        rows, grad_rows = x[token], grad[token]  # [S, H], sorted by expert
        weights = topk_weights.reshape(-1)[permutation, None]  # [S, 1]
        gate, up = ops.grouped_matmul_nt(rows, gate_up, offsets).to(acc).chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        activation = silu * up
        # The gradient of the activation before weighting: its product with the activation, summed,
        # is <grad, expert output>, the gradient of the weight, without the expert outputs.
        unweighted = ops.grouped_matmul_nn(grad_rows, down, offsets).to(acc)

        grad_x = grad_gate_up = grad_down = grad_weights = None
        if need_weights:
            grad_weights = (unweighted * activation).sum(-1)[inverse].view(num_tokens, top_k)
        if need_down:
            weighted = (weights * activation).to(dtype)
            grad_down = ops.grouped_matmul_tn(grad_rows, weighted, offsets)
        if need_x or need_gate_up:
            grad_activation = weights * unweighted
            grad_gate = grad_activation * up * sigmoid * (1 + gate * (1 - sigmoid))
            grad_pair = torch.cat([grad_gate, grad_activation * silu], dim=-1).to(dtype)  # [S, 2I]
            if need_gate_up:
                grad_gate_up = ops.grouped_matmul_tn(grad_pair, rows, offsets)
            if need_x:
                by_slot = ops.grouped_matmul_nn(grad_pair, gate_up, offsets)[inverse]
                by_slot = by_slot.view(num_tokens, top_k, x.shape[1])
                grad_x = by_slot.sum(1, dtype=acc).to(dtype)
        return grad_x, grad_gate_up, grad_down, grad_weights, None, None, None

    name = f"{namespace}::grouped_experts"
    torch.library.register_fake(name, _fake)
    torch.library.register_autograd(name, backward, setup_context=_setup_context)


register("mergeme")

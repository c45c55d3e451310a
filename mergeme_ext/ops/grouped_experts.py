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
    *,
    activation: str = "silu",
) -> Tensor:
    """Return, for every token of ``x``, the sum of its experts' outputs times ``topk_weights``.

    ``out[t] = sum over k of topk_weights[t, k] * down[e] (f(gate[e] x[t]) * (up[e] x[t]))`` with
    ``e`` the expert of slot ``t * K + k``, ``f`` the activation and ``gate, up =
    gate_up.chunk(2, dim=1)``. The routing comes from :func:`sort_by_expert`; slots that it dropped,
    at and after ``expert_offsets[E]``, contribute nothing.

    Args:
        x: ``[T, H]``; the tokens, in their own order.
        gate_up: ``[E, 2I, H]``, E >= 1, dtype of ``x``; each expert's I gate rows, then its I up
            rows (the in-memory layout of transformers).
        down: ``[E, H, I]``, dtype of ``x``.
        topk_weights: ``[T, K]`` float32 (float64 for float64 ``x``); any values, K >= 0.
        expert_offsets: int32 ``[E + 1]``, non-decreasing from 0 to at most T * K.
        permutation: int32 ``[T * K]``; sorted position to slot.
        inverse: int32 ``[T * K]``; slot to sorted position.
        activation: ``"silu"``, ``"gelu"`` (exact, by erf) or ``"gelu_tanh"``.

    Returns:
        A new contiguous ``[T, H]`` of ``x``'s dtype. Products and the sum over k, in ascending k,
        are formed in float32 (float64 for float64 inputs). Rounded to the dtype are only the
        activations between the two products, and the result.

    Raises:
        TypeError: A dtype is not the documented one.
        ValueError: A shape or device does not match, or (CPU; on CUDA the kernel asserts)
            ``expert_offsets`` does not run from 0 to at most T * K without decreasing; or
            ``activation`` is not among the allowed.
        IndexError: ``permutation`` or ``inverse`` leaves ``[0, T * K)`` (CPU; on CUDA the kernel
            asserts).

    Gradient: ``x``, ``gate_up``, ``down`` and ``topk_weights``, in closed form. Kept for it are the
    inputs and the products of ``gate_up`` ``[T * K, 2I]``: no activation and no expert's output.
    Second derivatives raise NotImplementedError.

    Source: SwiGLU experts, Shazeer 2020, arXiv:2002.05202, in the sparsely gated sum of Shazeer et
    al. 2017, arXiv:1701.06538, equation 1; the gather fused into the first product follows
    ScatterMoE, Tan et al. 2024, arXiv:2403.08245.
    """
    # Only training pays for keeping the products of gate_up.
    save = torch.is_grad_enabled() and any(
        t.requires_grad for t in (x, gate_up, down, topk_weights)
    )
    out, _ = torch.ops.mergeme.grouped_experts.default(
        x,
        gate_up,
        down,
        topk_weights,
        expert_offsets,
        permutation,
        inverse,
        activation=activation,
        save=save,
    )
    return out


def _fake(
    x,
    gate_up,
    down,
    topk_weights,
    expert_offsets,
    permutation,
    inverse,
    *,
    activation="silu",
    save=False,
):
    rows = topk_weights.shape[0] * topk_weights.shape[1] if save else 0
    return x.new_empty(x.shape), x.new_empty(rows, gate_up.shape[1])


def _fake_backward(
    grad,
    x,
    gate_up,
    down,
    topk_weights,
    expert_offsets,
    permutation,
    inverse,
    preactivation,
    *,
    activation="silu",
    output_mask,
):
    inputs = (x, gate_up, down, topk_weights)
    return tuple(
        t.new_empty(t.shape) if wanted else t.new_empty(0)
        for t, wanted in zip(inputs, output_mask, strict=True)
    )


def _setup_context(ctx, inputs, keyword_only_inputs, output):
    _, preactivation = output
    ctx.mark_non_differentiable(preactivation)
    ctx.set_materialize_grads(False)
    ctx.activation = keyword_only_inputs["activation"]
    ctx.saved = keyword_only_inputs["save"]
    ctx.save_for_backward(*inputs, preactivation)


def _refuse_second_order(ctx, *grads):
    raise NotImplementedError(
        "mergeme::grouped_experts_backward: second derivatives of grouped_experts are not supported"
    )


def register(namespace: str) -> None:
    """Give the ops of ``namespace`` their fakes and gradients."""
    ops = getattr(torch.ops, namespace)

    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 7
        *inputs, preactivation = ctx.saved_tensors
        x, gate_up, _, topk_weights, offsets, permutation, _ = inputs
        if not ctx.saved:
            token = permutation // max(topk_weights.shape[1], 1)
            preactivation = ops.grouped_matmul_nt.default(x[token], gate_up, offsets)
        needed = list(ctx.needs_input_grad[:4])
        grads = ops.grouped_experts_backward.default(
            grad, *inputs, preactivation, activation=ctx.activation, output_mask=needed
        )
        wanted = (g if need else None for g, need in zip(grads, needed, strict=True))
        return (*wanted, None, None, None)

    name = f"{namespace}::grouped_experts"
    torch.library.register_fake(name, _fake)
    torch.library.register_autograd(name, backward, setup_context=_setup_context)
    torch.library.register_fake(f"{name}_backward", _fake_backward)
    torch.library.register_autograd(f"{name}_backward", _refuse_second_order)


register("mergeme")

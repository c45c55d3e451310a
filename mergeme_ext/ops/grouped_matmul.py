"""Grouped matrix products: one product per expert over contiguous groups of tokens."""

import torch
from torch import Tensor

__all__ = ["grouped_matmul_nn", "grouped_matmul_nt", "grouped_matmul_tn"]


def grouped_matmul_nt(a: Tensor, b: Tensor, expert_offsets: Tensor) -> Tensor:
    """Return, for each expert's rows of ``a``, their product with that expert's ``b`` transposed.

    ``out[offsets[e]:offsets[e + 1]] = a[offsets[e]:offsets[e + 1]] @ b[e].T``: the forward of a
    linear layer per expert, with weights stored as ``[out_features, in_features]``.

    Args:
        a: ``[M, K]``; rows sorted by expert.
        b: ``[E, N, K]``, E >= 1, dtype of ``a``.
        expert_offsets: int32 ``[E + 1]``, non-decreasing from 0 to at most M; equal neighbours make
            an empty group. Rows from the last offset on belong to no expert.

    Returns:
        A new contiguous ``[M, N]`` of ``a``'s dtype, zero in the rows of no expert. Sums are formed
        in float32 (float64 for float64 inputs) and rounded once.

    Raises:
        TypeError: A dtype is not the documented one.
        ValueError: A shape or device does not match, or (CPU; on CUDA the kernel asserts)
            ``expert_offsets`` does not run from 0 to at most M without decreasing.

    Gradient: ``a`` and ``b``.

    On CUDA devices of compute capability 9.0 and 10.0, bfloat16 products of aligned operands whose
    sizes are multiples of 8 are left to torch's own ``grouped_mm``, whose kernels for these devices
    are faster for now. The result is as said here; its last bits may differ from other devices'.

    Source: the grouped GEMM of MegaBlocks, Gale et al. 2022, arXiv:2211.15841, without its padding
    of groups to blocks.
    """
    return torch.ops.mergeme.grouped_matmul_nt.default(a, b, expert_offsets)


def grouped_matmul_nn(a: Tensor, b: Tensor, expert_offsets: Tensor) -> Tensor:
    """Return, for each expert's rows of ``a``, their product with that expert's ``b``.

    ``out[offsets[e]:offsets[e + 1]] = a[offsets[e]:offsets[e + 1]] @ b[e]``: the gradient of
    :func:`grouped_matmul_nt` with respect to its ``a``, and a linear layer whose weights are stored
    as ``[in_features, out_features]``.

    Args:
        a: ``[M, K]``; rows sorted by expert.
        b: ``[E, K, N]``, E >= 1, dtype of ``a``.
        expert_offsets: int32 ``[E + 1]``, non-decreasing from 0 to at most M; equal neighbours make
            an empty group. Rows from the last offset on belong to no expert.

    Returns:
        A new contiguous ``[M, N]`` of ``a``'s dtype, zero in the rows of no expert. Sums are formed
        in float32 (float64 for float64 inputs) and rounded once.

    Raises:
        TypeError: A dtype is not the documented one.
        ValueError: A shape or device does not match, or (CPU; on CUDA the kernel asserts)
            ``expert_offsets`` does not run from 0 to at most M without decreasing.

    Gradient: ``a`` and ``b``.

    On CUDA devices of compute capability 9.0 and 10.0, bfloat16 products of aligned operands whose
    sizes are multiples of 8 are left to torch's own ``grouped_mm``, whose kernels for these devices
    are faster for now. The result is as said here; its last bits may differ from other devices'.

    Source: the grouped GEMM of MegaBlocks, Gale et al. 2022, arXiv:2211.15841, without its padding
    of groups to blocks.
    """
    return torch.ops.mergeme.grouped_matmul_nn.default(a, b, expert_offsets)


def grouped_matmul_tn(a: Tensor, b: Tensor, expert_offsets: Tensor) -> Tensor:
    """Return per expert the product of its rows of ``a``, transposed, with its rows of ``b``.

    ``out[e] = a[offsets[e]:offsets[e + 1]].T @ b[offsets[e]:offsets[e + 1]]``: the gradient of the
    other two with respect to the experts' weights. Only the reduction is ragged.

    Args:
        a: ``[M, N1]``; rows sorted by expert.
        b: ``[M, N2]``, dtype of ``a``; rows sorted alike.
        expert_offsets: int32 ``[E + 1]``, E >= 1, non-decreasing from 0 to at most M. Rows from the
            last offset on belong to no expert, and are left out.

    Returns:
        A new contiguous ``[E, N1, N2]`` of ``a``'s dtype, zero for an expert without rows. Sums are
        formed in float32 (float64 for float64 inputs) over ascending rows and rounded once.

    Raises:
        TypeError: A dtype is not the documented one.
        ValueError: A shape or device does not match, or (CPU; on CUDA the kernel asserts)
            ``expert_offsets`` does not run from 0 to at most M without decreasing.

    Gradient: ``a`` and ``b``.

    On CUDA devices of compute capability 9.0 and 10.0, bfloat16 products of aligned operands whose
    sizes are multiples of 8 are left to torch's own ``grouped_mm``, whose kernels for these devices
    are faster for now. The result is as said here; its last bits may differ from other devices'.

    Source: the weight gradient of MegaBlocks, Gale et al. 2022, arXiv:2211.15841, without its
    padding of groups to blocks.
    """
    return torch.ops.mergeme.grouped_matmul_tn.default(a, b, expert_offsets)


def _fake_nt(a, b, expert_offsets):
    return a.new_empty(a.shape[0], b.shape[1])


def _fake_nn(a, b, expert_offsets):
    return a.new_empty(a.shape[0], b.shape[2])


def _fake_tn(a, b, expert_offsets):
    return a.new_empty(expert_offsets.shape[0] - 1, a.shape[1], b.shape[1])


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def register(namespace: str) -> None:
    """Give the ops of ``namespace`` their fakes and gradients."""
    ops = getattr(torch.ops, namespace)
    nt, nn, tn = ops.grouped_matmul_nt, ops.grouped_matmul_nn, ops.grouped_matmul_tn

    # Each is linear in both inputs, so its gradients are the other two layouts.
    def backward_nt(ctx, grad):
        a, b, offsets = ctx.saved_tensors
        need_a, need_b, _ = ctx.needs_input_grad
        return (
            nn(grad, b, offsets) if need_a else None,
            tn(grad, a, offsets) if need_b else None,
            None,
        )

    def backward_nn(ctx, grad):
        a, b, offsets = ctx.saved_tensors
        need_a, need_b, _ = ctx.needs_input_grad
        return (
            nt(grad, b, offsets) if need_a else None,
            tn(a, grad, offsets) if need_b else None,
            None,
        )

    def backward_tn(ctx, grad):
        a, b, offsets = ctx.saved_tensors
        need_a, need_b, _ = ctx.needs_input_grad
        return (
            nt(b, grad, offsets) if need_a else None,
            nn(a, grad, offsets) if need_b else None,
            None,
        )

    for layout, fake, backward in (
        ("nt", _fake_nt, backward_nt),
        ("nn", _fake_nn, backward_nn),
        ("tn", _fake_tn, backward_tn),
    ):
        name = f"{namespace}::grouped_matmul_{layout}"
        torch.library.register_fake(name, fake)
        torch.library.register_autograd(name, backward, setup_context=_setup_context)


register("mergeme")

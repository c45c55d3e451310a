"""Sorting routed tokens by expert: the metadata of a grouped matmul."""

import torch
from torch import Tensor

__all__ = ["sort_by_expert"]


def sort_by_expert(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the stable order of the slots of ``topk_ids`` by expert, and the groups' boundaries.

    A slot is one choice of one token: ``s = t * K + k``, S = T * K in all.

    Args:
        topk_ids: int32 ``[T, K]``, each in ``[0, num_experts)``.
        num_experts: E, at least 1.

    Returns:
        ``expert_offsets``, int32 ``[E + 1]``: expert e has the sorted positions
        ``expert_offsets[e]`` to ``expert_offsets[e + 1] - 1``; it starts at 0 and ends at S.
        ``permutation``, int32 ``[S]``: sorted position to slot; within an expert slots ascend.
        ``inverse``, int32 ``[S]``: slot to sorted position. All new.

    Raises:
        TypeError: ``topk_ids`` is not int32.
        ValueError: ``topk_ids`` is not ``[T, K]`` or has 2^31 slots or more, or ``num_experts`` is
            out of range.
        IndexError: An id is outside ``[0, num_experts)`` (CPU; on CUDA the kernel asserts).

    Gradient: none; ids are integers.

    Source: counting sort, Seward 1954 (Knuth, The Art of Computer Programming, vol. 3, section
    5.2, algorithm D).
    """
    return torch.ops.mergeme.sort_by_expert.default(topk_ids, num_experts)


def _fake(topk_ids, num_experts):
    num_slots = topk_ids.numel()
    return (
        topk_ids.new_empty(num_experts + 1),
        topk_ids.new_empty(num_slots),
        topk_ids.new_empty(num_slots),
    )


def _backward(ctx, *grads):
    raise NotImplementedError("mergeme::sort_by_expert has no gradient")


def register(namespace: str) -> None:
    """Give ``namespace``'s op its fake and its refusal of gradients."""
    name = f"{namespace}::sort_by_expert"
    torch.library.register_fake(name, _fake)
    torch.library.register_autograd(name, _backward)


register("mergeme")

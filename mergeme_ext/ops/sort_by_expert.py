"""Sorting routed tokens by expert: the metadata of a grouped matmul."""

import torch
from torch import Tensor

__all__ = ["sort_by_expert"]


def sort_by_expert(
    topk_ids: Tensor,
    num_experts: int,
    *,
    sentinel: bool = False,
    capacity: int | None = None,
    priority: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the stable order of the slots of ``topk_ids`` by expert, and the groups' boundaries.

    A slot is one choice of one token: ``s = t * K + k``, S = T * K in all.

    Args:
        topk_ids: int32 ``[T, K]``, each in ``[0, num_experts)``.
        num_experts: E, at least 1.
        sentinel: Whether an id may also be E, for "no expert here" (one that another process
            holds, say). Such a slot is dropped.
        capacity: The most slots an expert takes; None for no limit. The others are dropped.
        priority: float32 or float64 ``[T, K]``, with a capacity only: an expert keeps its slots of
            greatest priority, of equal ones the lower slot; NaN is the greatest. Without it an
            expert keeps its first slots.

    Returns:
        ``expert_offsets``, int32 ``[E + 1]``: expert e has the sorted positions
        ``expert_offsets[e]`` to ``expert_offsets[e + 1] - 1``; it starts at 0 and ends at S less
        the number of dropped slots. ``permutation``, int32 ``[S]``: sorted position to slot; within
        an expert slots ascend, and behind all experts come the dropped ones, ascending too.
        ``inverse``, int32 ``[S]``: slot to sorted position. All new.

    Raises:
        TypeError: A dtype is not the documented one.
        ValueError: ``topk_ids`` is not ``[T, K]`` or has 2^31 slots or more, ``priority`` has
            another shape or device or comes without a capacity, or a number is out of range.
        IndexError: An id is neither in ``[0, num_experts)`` nor a permitted sentinel (CPU; on CUDA
            the kernel asserts).

    Gradient: none; ids are integers.

    Source: counting sort, Seward 1954 (Knuth, The Art of Computer Programming, vol. 3, section
    5.2, algorithm D). Capacity in slot order: Lepikhin et al. 2020 (GShard), arXiv:2006.16668,
    algorithm 1; by priority: Riquelme et al. 2021 (V-MoE), arXiv:2106.05974, section 4.1, which
    ranks whole tokens by their greatest weight, as a ``priority`` that is equal in a row does.
    """
    return torch.ops.mergeme.sort_by_expert.default(
        topk_ids, num_experts, priority, sentinel=sentinel, capacity=capacity
    )


def _fake(topk_ids, num_experts, priority=None, *, sentinel=False, capacity=None):
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

"""Expert weights in the order the CPU's loops read them, and what runs on them: inference only."""

import torch
from torch import Tensor

__all__ = ["pack_experts", "packed_experts", "packed_matmul", "unpack_experts"]

COLUMNS = 32  # of a panel
DEPTH = 32  # panels are filled up with zeros to a multiple of it


def pack_experts(
    weight: Tensor, *, gated: bool = False, interleaved: bool = False, transposed: bool = False
) -> Tensor:
    """Return ``weight`` in panels of 32 output columns, for :func:`packed_experts` and others.

    The packed copy takes as much memory as the weight (more only where N is no multiple of 32, or
    K none). One layout serves all instruction sets, so it may be made on one machine and used on
    another.

    Args:
        weight: ``[E, N, K]`` float32, bfloat16 or float16 on the CPU; N outputs of K inputs each.
        gated: The N = 2I rows are gate and up; their products then lie side by side, as
            ``packed_experts`` takes its ``gate_up``.
        interleaved: With ``gated``: the rows alternate, gate 0, up 0, gate 1, ... (the storage of
            gpt-oss), instead of all gate rows before all up rows.
        transposed: ``weight`` is ``[E, K, N]``.

    Returns:
        New, of the same dtype: ``[E, panels, K, 32]``, each panel at a multiple of 32 K's. Its
        elements are in an order of their own; :func:`unpack_experts` undoes it. Keep it as it is:
        a copy with other strides is refused.

    Raises:
        TypeError: The dtype is not one of these.
        ValueError: ``weight`` has not three dimensions, or 2I is odd.
        NotImplementedError: ``weight`` is not on the CPU.

    Source: panels as in Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix
    Multiplication"; two steps of a column side by side, as AMX and VDPBF16PS take them.
    """
    return torch.ops.mergeme.pack_experts.default(
        weight, gated=gated, interleaved=interleaved, transposed=transposed
    )


def unpack_experts(
    packed: Tensor,
    *,
    rows: int,
    depth: int,
    gated: bool = False,
    interleaved: bool = False,
    transposed: bool = False,
) -> Tensor:
    """Return the weight that :func:`pack_experts` packed, bit for bit.

    Args:
        packed: Its result.
        rows: N of the weight.
        depth: K of the weight.
        gated: As it was packed.
        interleaved: As it was packed.
        transposed: As it was packed.

    Returns:
        New, contiguous, ``[E, N, K]``, or ``[E, K, N]`` if ``transposed``.

    Raises:
        TypeError: The dtype is not float32, bfloat16 or float16.
        ValueError: ``packed`` does not hold such a weight.
        NotImplementedError: ``packed`` is not on the CPU.

    Source: as :func:`pack_experts`.
    """
    return torch.ops.mergeme.unpack_experts.default(
        packed,
        rows=rows,
        depth=depth,
        gated=gated,
        interleaved=interleaved,
        transposed=transposed,
    )


def packed_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    expert_offsets: Tensor,
    permutation: Tensor,
    inverse: Tensor,
    *,
    intermediate: int,
    activation: str = "silu",
) -> Tensor:
    """Return what ``grouped_experts`` returns, from packed weights.

    With float32 the results, and with the half types those of processors without AMX and
    AVX512-BF16, are the same to the last bit. Those two sum bfloat16 products in pairs, and
    take denormal numbers as zero.

    Args:
        x: ``[T, H]`` float32, bfloat16 or float16.
        gate_up: ``[E, 2I, H]`` packed with ``gated=True``, dtype of ``x``.
        down: ``[E, H, I]`` packed, dtype of ``x``.
        topk_weights: ``[T, K]`` float32.
        expert_offsets: int32 ``[E + 1]``, from :func:`sort_by_expert`; as in ``grouped_experts``,
            slots at and after ``expert_offsets[E]`` contribute nothing.
        permutation: int32 ``[T * K]``; sorted position to slot.
        inverse: int32 ``[T * K]``; slot to sorted position.
        intermediate: I.
        activation: ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.

    Returns:
        A new contiguous ``[T, H]`` of ``x``'s dtype.

    Raises:
        TypeError: A dtype is not the documented one.
        ValueError: A shape does not match, or a packed weight is not one of such a shape.
        IndexError: ``permutation`` or ``inverse`` leaves ``[0, T * K)``.
        NotImplementedError: The tensors are not on the CPU, or a gradient is asked for.

    Source: as ``grouped_experts``.
    """
    return torch.ops.mergeme.packed_experts.default(
        x,
        gate_up,
        down,
        topk_weights,
        expert_offsets,
        permutation,
        inverse,
        intermediate=intermediate,
        activation=activation,
    )


def packed_matmul(a: Tensor, packed: Tensor, expert_offsets: Tensor, *, columns: int) -> Tensor:
    """Return ``out[i] = weight[e] a[i]`` with ``e`` the group of row i, from a packed weight.

    Args:
        a: ``[M, K]`` float32, bfloat16 or float16; rows sorted by group.
        packed: ``[E, N, K]`` packed, not gated, dtype of ``a``.
        expert_offsets: int32 ``[E + 1]``, non-decreasing from 0 to at most M; rows at and after
            ``expert_offsets[E]`` belong to no group and give zeros.
        columns: N.

    Returns:
        A new contiguous ``[M, N]`` of ``a``'s dtype, summed in float32 and rounded once.

    Raises:
        TypeError: A dtype is not the documented one.
        ValueError: A shape or the offsets do not match, or ``packed`` is not of such a weight.
        NotImplementedError: The tensors are not on the CPU, or a gradient is asked for.

    Source: MegaBlocks, Gale et al. 2022, arXiv:2211.15841 (the grouped product).
    """
    return torch.ops.mergeme.packed_matmul.default(a, packed, expert_offsets, columns=columns)


def _fake_pack(weight, *, gated=False, interleaved=False, transposed=False):
    experts, rows, depth = weight.shape
    if transposed:
        rows, depth = depth, rows
    panels = -(-rows // COLUMNS)
    if gated:
        panels = -(-(rows // 2) // (COLUMNS // 2))
    return weight.new_empty(experts, panels, -(-depth // DEPTH) * DEPTH, COLUMNS)[:, :, :depth]


def _fake_unpack(packed, *, rows, depth, gated=False, interleaved=False, transposed=False):
    return packed.new_empty(packed.shape[0], *((depth, rows) if transposed else (rows, depth)))


def _fake_experts(
    x,
    gate_up,
    down,
    topk_weights,
    expert_offsets,
    permutation,
    inverse,
    *,
    intermediate,
    activation="silu",
):
    return x.new_empty(x.shape)


def _fake_matmul(a, packed, expert_offsets, *, columns):
    return a.new_empty(a.shape[0], columns)


FAKES = {
    "pack_experts": _fake_pack,
    "unpack_experts": _fake_unpack,
    "packed_experts": _fake_experts,
    "packed_matmul": _fake_matmul,
}


def register(namespace: str) -> None:
    """Give the ops of ``namespace`` their fakes, and a gradient that raises."""

    def refuse(name):
        def backward(ctx, *grads):
            raise NotImplementedError(
                f"mergeme::{name}: packed weights are for inference; train with the weights as "
                "they are and grouped_experts or grouped_matmul_nt"
            )

        return backward

    for name, fake in FAKES.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)
        torch.library.register_autograd(f"{namespace}::{name}", refuse(name))


register("mergeme")

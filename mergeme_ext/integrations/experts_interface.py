"""The forward that ``experts_implementation="mergeme"`` runs in transformers' experts classes."""

import functools

import torch
from torch import Tensor, nn
from transformers import activations
from transformers.integrations import moe

from mergeme_ext.moe.slots import combine_slots, gather_slots
from mergeme_ext.ops import grouped_experts, grouped_matmul_nn, grouped_matmul_nt, sort_by_expert

__all__ = ["experts_forward", "fused_activation"]

# Not public in transformers; were it gone, no class would be known to have it, and everything would
# run in steps.
DEFAULT_GATE = getattr(moe, "_default_apply_gate", None)


def experts_forward(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return, for each token, the weighted sum of its experts' outputs.

    Args:
        experts: Of a class that transformers' ``use_experts_implementation`` decorates.
        hidden_states: Tokens [T, H]; of another dtype than the weights, they are cast to it, and
            under autocast both are cast to autocast's.
        top_k_index: Integers [T, K], each in [0, E); E itself where the module runs its share of
            an expert-parallel group and the expert is another process's.
        top_k_weights: [T, K].

    Returns:
        [T, H], new, dtype of ``hidden_states``; summed in float32 (float64 for float64) over k in
        order and rounded once.

    Raises:
        IndexError: An id is out of range (CPU; on CUDA the kernel asserts).
    """
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    down = experts.down_proj
    dtype = compute_dtype(hidden_states, first)
    x, first, down = hidden_states.to(dtype), first.to(dtype), down.to(dtype)
    weights = top_k_weights.to(torch.float64 if dtype == torch.float64 else torch.float32)
    num_experts = down.shape[0]
    # An int64 id beyond int32 must not wrap round into the range.
    ids = top_k_index.clamp(-1, num_experts + 1).to(torch.int32)
    routing = _sort(ids, num_experts, experts._is_expert_parallel)
    activation = fused_activation(experts)
    if activation is not None and not experts.is_transposed:
        out = grouped_experts(x, first, down, weights, *routing, activation=activation)
    else:
        out = _run_in_steps(experts, x, first, down, weights, routing, dtype)
    return out.to(hidden_states.dtype)


def _sort(ids: Tensor, num_experts: int, sentinel: bool) -> tuple[Tensor, Tensor, Tensor]:
    if not sentinel:
        return sort_by_expert(ids, num_experts)
    offsets, permutation, inverse = sort_by_expert(ids, num_experts + 1)
    return offsets[:-1], permutation, inverse


def _run_in_steps(
    experts: nn.Module,
    x: Tensor,
    first: Tensor,
    down: Tensor,
    weights: Tensor,
    routing: tuple[Tensor, Tensor, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Two grouped matmuls with the class's own functions between and after them."""
    offsets, permutation, inverse = routing
    matmul = grouped_matmul_nn if experts.is_transposed else grouped_matmul_nt
    rows = gather_slots(x, permutation, inverse, weights.shape[1])
    rows = matmul(rows, first, offsets)
    if experts.has_bias:
        name = "gate_up_proj_bias" if experts.has_gate else "up_proj_bias"
        rows = _add_bias(rows, getattr(experts, name), offsets)
    rows = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)
    rows = matmul(rows.to(dtype), down, offsets)
    if experts.has_bias:
        rows = _add_bias(rows, experts.down_proj_bias, offsets)
    if experts.has_post_expert_norm:
        rows = experts.post_expert_norm(rows)
    return combine_slots(rows.to(dtype), weights, permutation, inverse)


def _add_bias(rows: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
    # The product of a column of ones and the bias as a matrix of one row repeats each expert's bias
    # exactly, and its gradient is a sum over the expert's rows in float32; the gradient of indexing
    # would add up thousands of rows in the half type. Rows of no expert get zero.
    ones = rows.new_ones(rows.shape[0], 1)
    return rows + grouped_matmul_nn(ones, bias.to(rows.dtype)[:, None], offsets)


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype that a linear layer would compute in: autocast's, or the weights' own."""
    kind = x.device.type
    # Like torch's linear, autocast leaves float64 alone.
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def fused_activation(experts: nn.Module) -> str | None:
    """Return the activation under which ``grouped_experts`` computes what ``experts`` does.

    Nothing is assumed of a class: the gate function must be transformers' default one itself, on
    the class and not replaced on the module, and the activation one that is known by identity or
    exact type, without hooks or a forward of its own.

    Args:
        experts: Of a class that transformers' ``use_experts_implementation`` decorates.

    Returns:
        "silu", "gelu" or "gelu_tanh"; None where the fused op would not be this class's function.
    """
    if not experts.has_gate or experts.has_bias or experts.has_post_expert_norm:
        return None
    if not experts.is_concatenated:
        return None
    gate = type(experts)._apply_gate
    if DEFAULT_GATE is None or gate is not DEFAULT_GATE or "_apply_gate" in experts.__dict__:
        return None
    return _activation_name(experts.act_fn)


def _activation_name(act: object) -> str | None:
    if act is nn.functional.silu:
        return "silu"
    if act is nn.functional.gelu:
        return "gelu"
    if not isinstance(act, nn.Module) or "forward" in act.__dict__ or _has_hooks(act):
        return None
    kind = type(act)
    if kind is activations.SiLUActivation or kind is nn.SiLU:
        return "silu"
    if kind is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(act.approximate)
    if kind is activations.GELUActivation:
        return "gelu" if act.act is nn.functional.gelu else None
    if kind is activations.GELUTanh:
        act = act.act
        tanh = isinstance(act, functools.partial) and act.func is nn.functional.gelu
        return "gelu_tanh" if tanh and act.keywords == {"approximate": "tanh"} else None
    return "gelu_tanh" if kind is activations.NewGELUActivation else None


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )

"""The forward that ``experts_implementation="mergeme"`` runs in transformers' experts classes."""

import functools

import torch
from torch import Tensor, nn
from transformers import activations
from transformers.integrations import moe

from mergeme_ext.moe.packed import (
    cached_experts,
    cached_matmul,
    lets_cache,
    needs_grad,
    packed_copies,
)
from mergeme_ext.moe.packed_module import PackedWeights, packed_weights
from mergeme_ext.moe.slots import combine_slots, gather_slots
from mergeme_ext.ops import (
    grouped_experts,
    grouped_matmul_nn,
    grouped_matmul_nt,
    packed_experts,
    packed_matmul,
    sort_by_expert,
)

__all__ = ["activation_name", "experts_forward", "fused_activation", "packing_options"]

# Not public in transformers; were it gone, no class would be known to have it, and everything would
# run in steps.
DEFAULT_GATE = getattr(moe, "_default_apply_gate", None)


def experts_forward(
    experts: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    cache: bool = True,
) -> Tensor:
    """Return, for each token, the weighted sum of its experts' outputs.

    Args:
        experts: Of a class that transformers' ``use_experts_implementation`` decorates.
        hidden_states: Tokens [T, H]; of another dtype than the weights, they are cast to it, and
            under autocast both are cast to autocast's.
        top_k_index: Integers [T, K], each in [0, E); E itself where the module runs its share of
            an expert-parallel group and the expert is another process's.
        top_k_weights: [T, K].
        cache: Keep packed copies of the weights for inference on the CPU.

    Returns:
        [T, H], new, dtype of ``hidden_states``; summed in float32 (float64 for float64) over k in
        order and rounded once.

    Raises:
        IndexError: An id is out of range (CPU; on CUDA the kernel asserts).
    """
    first_name = "gate_up_proj" if experts.has_gate else "up_proj"
    first, down, held = getattr(experts, first_name), experts.down_proj, packed_weights(experts)
    dtype = compute_dtype(hidden_states, first) if held is None else held.dtype
    x = hidden_states.to(dtype)
    weights = top_k_weights.to(torch.float64 if dtype == torch.float64 else torch.float32)
    num_experts = down.shape[0] if held is None else held.shapes["down_proj"][0]
    # An int64 id beyond int32 must not wrap round into the range.
    ids = top_k_index.clamp(-1, num_experts + 1).to(torch.int32)
    routing = sort_by_expert(ids, num_experts, sentinel=experts._is_expert_parallel)
    if held is not None:
        products = _packed(experts, held, first_name, x, weights)
    elif cache and not _offloaded(experts) and lets_cache(experts, x, weights, first, down):
        products = _Cached(experts, first, down)
    else:
        if not torch.compiler.is_compiling():
            packed_copies.forget(first, down)
        products = _Plain(experts, first.to(dtype), down.to(dtype))
    activation = fused_activation(experts)
    if activation is not None and products.fuses:
        out = products.fused(x, weights, routing, activation)
    else:
        out = _run_in_steps(experts, x, weights, routing, products)
    return out.to(hidden_states.dtype)


def _offloaded(experts: nn.Module) -> bool:
    # accelerate's hook loads the weights anew for each call.
    return getattr(experts.__dict__.get("_hf_hook"), "offload", False)


class _Plain:
    """Products with the weights as they are; differentiable."""

    def __init__(self, experts: nn.Module, first: Tensor, down: Tensor) -> None:
        self.first, self.down = first, down
        self.matmul = grouped_matmul_nn if experts.is_transposed else grouped_matmul_nt
        self.fuses = not experts.is_transposed

    def fused(self, x: Tensor, weights: Tensor, routing: tuple, activation: str) -> Tensor:
        return grouped_experts(x, self.first, self.down, weights, *routing, activation=activation)

    def up(self, rows: Tensor, offsets: Tensor) -> Tensor:
        return self.matmul(rows, self.first, offsets)

    def back(self, rows: Tensor, offsets: Tensor) -> Tensor:
        return self.matmul(rows, self.down, offsets)


class _Cached:
    """Products with cached packed copies of the weights."""

    fuses = True

    def __init__(self, experts: nn.Module, first: Tensor, down: Tensor) -> None:
        self.first, self.down, self.transposed = first, down, experts.is_transposed

    def fused(self, x: Tensor, weights: Tensor, routing: tuple, activation: str) -> Tensor:
        arguments = (x, self.first, self.down, weights, *routing)
        return cached_experts(*arguments, activation=activation, transposed=self.transposed)

    def up(self, rows: Tensor, offsets: Tensor) -> Tensor:
        return cached_matmul(rows, self.first, offsets, transposed=self.transposed)

    def back(self, rows: Tensor, offsets: Tensor) -> Tensor:
        return cached_matmul(rows, self.down, offsets, transposed=self.transposed)


def _packed(
    experts: nn.Module, held: PackedWeights, first_name: str, x: Tensor, weights: Tensor
) -> "_Packed":
    reason = None
    if needs_grad(experts, x, weights):
        reason = "have no gradient; run under torch.no_grad(), or unpack the model to train it"
    elif x.device.type != "cpu":
        reason = f"stay on the CPU, but the tokens are on {x.device}; unpack the model to move it"
    elif held.options[first_name]["gated"] and fused_activation(experts) is None:
        reason = "were laid out for another gate or activation than it has now; unpack the model"
    if reason is not None:
        raise RuntimeError(f"{type(experts).__name__}: weights packed for inference {reason}")
    return _Packed(experts, held, first_name)


class _Packed:
    """Products with the packed weights that are in the parameters' place."""

    def __init__(self, experts: nn.Module, held: PackedWeights, first_name: str) -> None:
        self.first, self.down = held.packed[first_name], held.packed["down_proj"]
        first_shape, down_shape = held.shapes[first_name], held.shapes["down_proj"]
        columns = 2 if experts.is_transposed else 1
        self.inner, self.outer = first_shape[columns], down_shape[columns]
        self.intermediate = down_shape[3 - columns]
        self.fuses = held.options[first_name]["gated"]

    def fused(self, x: Tensor, weights: Tensor, routing: tuple, activation: str) -> Tensor:
        return packed_experts(
            x,
            self.first,
            self.down,
            weights,
            *routing,
            intermediate=self.intermediate,
            activation=activation,
        )

    def up(self, rows: Tensor, offsets: Tensor) -> Tensor:
        return packed_matmul(rows, self.first, offsets, columns=self.inner)

    def back(self, rows: Tensor, offsets: Tensor) -> Tensor:
        return packed_matmul(rows, self.down, offsets, columns=self.outer)


def _run_in_steps(
    experts: nn.Module,
    x: Tensor,
    weights: Tensor,
    routing: tuple[Tensor, Tensor, Tensor],
    products: _Plain | _Cached | _Packed,
) -> Tensor:
    """Two grouped matmuls with the class's own functions between and after them."""
    offsets, permutation, inverse = routing
    rows = gather_slots(x, permutation, inverse, weights.shape[1])
    rows = products.up(rows, offsets)
    if experts.has_bias:
        bias = experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias
        rows = _add_bias(rows, bias, offsets)
    rows = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)
    rows = products.back(rows.to(x.dtype), offsets)
    if experts.has_bias:
        rows = _add_bias(rows, experts.down_proj_bias, offsets)
    if experts.has_post_expert_norm:
        rows = experts.post_expert_norm(rows)
    return combine_slots(rows.to(x.dtype), weights, permutation, inverse)


def _add_bias(rows: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
    # The product of a column of ones and the bias as a matrix of one row repeats each expert's bias
    # exactly, and its gradient is a sum over the expert's rows in float32; the gradient of indexing
    # would add up thousands of rows in the half type. Rows of no expert get zero.
    ones = rows.new_ones(rows.shape[0], 1)
    return rows + grouped_matmul_nn(ones, bias.to(rows.dtype)[:, None], offsets)


def packing_options(experts: nn.Module) -> dict[str, dict[str, bool]]:
    """Return, by parameter name, how ``experts``' weights are to be packed for its forward."""
    transposed = {"transposed": experts.is_transposed}
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    gated = fused_activation(experts) is not None
    return {first: {"gated": gated, **transposed}, "down_proj": {"gated": False, **transposed}}


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
    return activation_name(experts.act_fn)


def activation_name(act: object) -> str | None:
    """Return what the ops call the function ``act``, or None if they do not have it."""
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

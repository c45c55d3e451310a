"""The experts' gated MLPs, packed in two tensors and run by one fused op."""

from collections.abc import MutableMapping

import torch
from torch import Tensor, nn

from mergeme_ext.moe.layouts import fuse_experts, keep_owned, per_expert_tensors
from mergeme_ext.moe.packed import cached_experts, can_cache, packed_copies
from mergeme_ext.ops import grouped_experts, sort_by_expert

__all__ = ["Experts", "per_expert_state_dict", "run_experts"]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def run_experts(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    activation: str = "silu",
    sentinel: bool = False,
    capacity: int | None = None,
    priority: Tensor | None = None,
    cache: bool = False,
) -> Tensor:
    """Return, for each token of ``x``, the weighted sum of its experts' outputs.

    Args:
        x: Tokens [T, H], floating.
        gate_up_proj: [E, 2I, H], dtype of ``x``: gate rows first, then up rows.
        down_proj: [E, H, I], dtype of ``x``.
        topk_ids: int32 [T, K], each in [0, E).
        topk_weights: [T, K], float32 (float64 with float64 ``x``).
        activation: "silu", "gelu" or "gelu_tanh".
        sentinel: Whether an id may also be E, for no expert.
        capacity: How many choices an expert takes at most; the rest add nothing. None for all.
        priority: [T, K], float32 or float64: which choices it takes, the greatest; None for the
            first.
        cache: See ``multiply_experts``.

    Returns:
        [T, H], new, contiguous, dtype of ``x``; summed in float32 (float64 for float64) over k in
        order and rounded once.

    Source: Mixtral, arXiv:2401.04088, section 2.
    """
    routing = sort_by_expert(
        topk_ids, gate_up_proj.shape[0], sentinel=sentinel, capacity=capacity, priority=priority
    )
    return multiply_experts(
        x, gate_up_proj, down_proj, topk_weights, routing, activation=activation, cache=cache
    )


def multiply_experts(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_weights: Tensor,
    routing: tuple[Tensor, Tensor, Tensor],
    *,
    activation: str,
    cache: bool,
) -> Tensor:
    """Return ``grouped_experts`` of the arguments, computed from cached packed weights if it may.

    Args:
        x: [T, H].
        gate_up_proj: [E, 2I, H], dtype of ``x``.
        down_proj: [E, H, I], dtype of ``x``.
        topk_weights: [T, K].
        routing: From ``sort_by_expert``.
        activation: "silu", "gelu" or "gelu_tanh".
        cache: The weights will be the same in later calls. On the CPU, where no gradient is
            recorded, packed copies of parameters are then made and kept (see ``PackedExperts``),
            which take as much memory again.

    Returns:
        [T, H], the same bits with and without ``cache``.
    """
    tensors = (x, gate_up_proj, down_proj, topk_weights)
    records = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    one_dtype = x.dtype == gate_up_proj.dtype == down_proj.dtype
    if cache and one_dtype and not records and x.device.type == "cpu":
        if can_cache(gate_up_proj) and can_cache(down_proj):
            return cached_experts(*tensors, *routing, activation=activation)
    elif not torch.compiler.is_compiling():
        packed_copies.forget(gate_up_proj, down_proj)
    return grouped_experts(*tensors, *routing, activation=activation)


class Experts(nn.Module):
    """E gated MLPs ``down(f(gate x) * up x)``, packed as transformers packs them in memory.

    ``load_state_dict`` takes the fused layout, which ``state_dict`` gives, and the per-expert ones
    of published checkpoints (``0.gate_proj.weight``, ... or ``0.w1.weight``, ...), which
    ``per_expert_state_dict`` gives.

    In evaluation mode, on the CPU and without gradients, packed copies of the weights are made at
    the first call and kept until the weights change: faster, the same results, and as much memory
    again. ``mergeme_ext.moe.packed.packed_copies.forget()`` frees them.

    Args:
        hidden_size: H.
        intermediate_size: I.
        num_experts: E.
        activation: f: "silu", "gelu" (exact, by erf) or "gelu_tanh".
        owned: The numbers of the experts whose weights this module holds; None for all. Only
            ``ParallelExperts`` can run with less.
        device: Where the parameters live.
        dtype: Their dtype.

    Parameters: ``gate_up_proj`` [E, 2I, H], gate rows first, and ``down_proj`` [E, H, I].
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        activation: str = "silu",
        owned: range | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(hidden_size, intermediate_size, num_experts) < 1:
            raise ValueError(
                "Experts: expected hidden_size, intermediate_size and num_experts to be positive, "
                f"got {hidden_size}, {intermediate_size} and {num_experts}"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"Experts: expected activation to be one of {ACTIVATIONS}, got {activation!r}"
            )
        self.activation = activation
        self.num_experts, self.owned = num_experts, owned or range(num_experts)
        where = {"device": device, "dtype": dtype}
        self.gate_up_proj = nn.Parameter(
            torch.empty(len(self.owned), 2 * intermediate_size, hidden_size, **where)
        )
        self.down_proj = nn.Parameter(
            torch.empty(len(self.owned), hidden_size, intermediate_size, **where)
        )
        self.register_load_state_dict_pre_hook(_accept_every_layout)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw both weights from a normal distribution.

        Every expert is drawn, also those that another rank holds: with equal seeds, the ranks
        together hold what one process would.
        """
        for parameter in (self.gate_up_proj, self.down_proj):
            elsewhere = torch.empty_like(parameter[0])
            for e in range(self.num_experts):
                here = e in self.owned
                nn.init.normal_(parameter[e - self.owned.start] if here else elsewhere, std=std)

    def forward(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        *,
        sentinel: bool = False,
        capacity: int | None = None,
        priority: Tensor | None = None,
    ) -> Tensor:
        """Return [T, H]: see ``run_experts``."""
        return run_experts(
            x,
            self.gate_up_proj,
            self.down_proj,
            topk_ids,
            topk_weights,
            activation=self.activation,
            sentinel=sentinel,
            capacity=capacity,
            priority=priority,
            # The weights of a module in training will have changed by the next step.
            cache=not self.training,
        )

    def extra_repr(self) -> str:
        """Sizes, for ``print(module)``."""
        _, hidden_size, intermediate_size = self.down_proj.shape
        return (
            f"hidden_size={hidden_size}, intermediate_size={intermediate_size}, "
            f"num_experts={self.num_experts}, activation={self.activation}"
        )


def per_expert_state_dict(module: nn.Module, layout: str = "projections") -> dict[str, Tensor]:
    """Return ``module.state_dict()`` with the weights of every ``Experts`` split by expert.

    Args:
        module: An ``Experts``, or anything that holds some.
        layout: "projections" for ``{i}.gate_proj.weight``, ``up_proj`` and ``down_proj``, the names
            in checkpoints of OLMoE, Qwen and DeepSeek; "mixtral" for ``w1``, ``w3`` and ``w2``.

    Returns:
        Views of the module's tensors; ``load_state_dict`` takes them back. Experts divided over
        ranks appear under their numbers in the whole layer, each on its own rank.

    Raises:
        ValueError: ``layout`` is unknown.
    """
    split = {
        f"{name}.gate_up_proj".lstrip("."): (f"{name}.".lstrip("."), experts)
        for name, experts in module.named_modules()
        if isinstance(experts, Experts)
    }
    gone = {prefix + "down_proj" for prefix, _ in split.values()}
    found, state = {}, module.state_dict()
    for key, tensor in state.items():
        if key in split:
            prefix, experts = split[key]
            down = state[prefix + "down_proj"]
            matrices = per_expert_tensors(tensor, down, experts.owned, layout)
            found |= {prefix + name: matrix for name, matrix in matrices.items()}
        elif key not in gone:
            found[key] = tensor
    return found


def _accept_every_layout(
    experts: Experts,
    state_dict: MutableMapping[str, Tensor],
    prefix: str,
    local_metadata: dict,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    fuse_experts(experts, state_dict, prefix, missing_keys, error_msgs)
    keep_owned(experts, state_dict, prefix)

"""The Mixture-of-Experts layer: a router and its experts."""

import math
from collections.abc import MutableMapping, Sequence
from typing import Self, Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mergeme_ext.moe.experts import Experts
from mergeme_ext.moe.parallel import ParallelExperts
from mergeme_ext.moe.probe import RENAMED, compare, read_block
from mergeme_ext.moe.router import RouterOptions, Routing, TopKRouter
from mergeme_ext.moe.shared import SharedExpert

__all__ = ["MoELayer"]

DROP_POLICIES = ("order", "weight", "token")


class MoELayer(nn.Module):
    """Sends each token through ``top_k`` of ``num_experts`` gated MLPs and sums their outputs.

    ``load_state_dict`` takes experts fused or one by one (see ``Experts``), and the router and the
    shared expert also by the names that transformers gives them.

    Args:
        hidden_size: H.
        intermediate_size: I, of one expert.
        num_experts: E.
        top_k: K in [1, E].
        activation: Of the experts: "silu", "gelu" or "gelu_tanh".
        capacity_factor: An expert takes at most ``ceil(capacity_factor * T * K / E)`` of the T * K
            choices of one call; the others add nothing to their tokens. None for no limit.
        drop_policy: Which choices an expert takes: "order", the first tokens'; "weight", those of
            the greatest weight; "token", those of the tokens whose greatest weight is greatest.
        shared_intermediate_size: I of an expert that every token goes through; None for none.
        shared_gate: Multiply the shared expert's output by ``sigmoid(shared_expert_gate(x))``.
        device: Where the parameters live.
        dtype: Their dtype.
        **router: Options of ``TopKRouter``: score, renormalize, scale, selection_bias, num_groups,
            top_groups, group_score, jitter, compute_dtype.

    Parameters: ``router.weight`` [E, H], ``experts.gate_up_proj`` [E, 2I, H] (gate rows first) and
    ``experts.down_proj`` [E, H, I]; with a shared expert ``shared_expert.gate_proj.weight``,
    ``shared_expert.up_proj.weight``, ``shared_expert.down_proj.weight`` and, with its gate,
    ``shared_expert_gate.weight`` [1, H].

    Source: Mixtral, arXiv:2401.04088 (the default options); MergeME, arXiv:2502.00997, section 3.1.
    Capacity: GShard, arXiv:2006.16668, section 3.2 ("order"); V-MoE, Riquelme et al. 2021,
    arXiv:2106.05974, section 4.1 ("token"). Shared expert: DeepSeekMoE, arXiv:2401.06066; its gate:
    Qwen1.5-MoE.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        activation: str = "silu",
        capacity_factor: float | None = None,
        drop_policy: str = "order",
        shared_intermediate_size: int | None = None,
        shared_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **router: Unpack[RouterOptions],
    ) -> None:
        super().__init__()
        if capacity_factor is not None and not 0 < capacity_factor < math.inf:
            raise ValueError(
                f"MoELayer: expected capacity_factor to be positive or None, got {capacity_factor}"
            )
        if drop_policy not in DROP_POLICIES:
            raise ValueError(
                f"MoELayer: expected drop_policy to be one of {DROP_POLICIES}, got {drop_policy!r}"
            )
        if shared_gate and shared_intermediate_size is None:
            raise ValueError("MoELayer: expected shared_intermediate_size with shared_gate=True")
        self.capacity_factor, self.drop_policy = capacity_factor, drop_policy
        where = {"device": device, "dtype": dtype}
        self.router = TopKRouter(hidden_size, num_experts, top_k, **router, **where)
        self.experts = Experts(
            hidden_size, intermediate_size, num_experts, activation=activation, **where
        )
        self.shared_expert = self.shared_expert_gate = None
        if shared_intermediate_size is not None:
            self.shared_expert = SharedExpert(
                hidden_size, shared_intermediate_size, activation=activation, **where
            )
        if shared_gate:
            self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False, **where)
        self.register_load_state_dict_pre_hook(_rename)

    @classmethod
    def from_transformers(cls, block: nn.Module) -> Self:
        """Return a layer that shares the parameters of a block of transformers 5.

        The block is a ``MixtralSparseMoeBlock`` or one with the same parts, as Qwen2-MoE,
        Qwen3-MoE, OLMoE, DeepSeek-V2 and -V3 have: ``gate.weight`` [E, H], ``gate.top_k``,
        ``experts.gate_up_proj`` [E, 2I, H], ``experts.down_proj`` [E, H, I], and perhaps
        ``shared_expert`` with ``shared_expert_gate``, or ``shared_experts``. How it routes is found
        by running its parts on small random weights, and the layer is then compared with the block
        on others, so that a block that computes something else is refused.

        Args:
            block: Its parameters may be on any device, meta included.

        Returns:
            The layer; its parameters are the block's own, so training one trains the other. The
            training-time jitter of Mixtral's inputs is left out.

        Raises:
            TypeError: ``block`` lacks a part, as before transformers 5, or has one more.
            ValueError: It computes what no options of this layer compute.
        """
        found = read_block(block)
        num_experts, hidden_size, intermediate_size = block.experts.down_proj.shape
        layer = cls(
            hidden_size,
            intermediate_size,
            num_experts,
            block.gate.top_k,
            activation=found.activation,
            shared_intermediate_size=None if found.shared_expert is None else 1,
            shared_gate=found.shared_gate is not None,
            device="meta",
            **found.router,
        )
        layer.router.weight = block.gate.weight
        if found.selection_bias is not None:
            layer.router.selection_bias = found.selection_bias
            layer.router.expert_counts = torch.zeros(
                num_experts, dtype=torch.int64, device=found.selection_bias.device
            )
        layer.experts.gate_up_proj = block.experts.gate_up_proj
        layer.experts.down_proj = block.experts.down_proj
        if found.shared_expert is not None:
            for name in ("gate_proj", "up_proj", "down_proj"):
                setattr(layer.shared_expert, name, getattr(found.shared_expert, name))
        if found.shared_gate is not None:
            layer.shared_expert_gate = found.shared_gate
        compare(block, layer)
        return layer.train(block.training)

    @classmethod
    def from_mixtral(cls, block: nn.Module) -> Self:
        """Return ``from_transformers(block)``."""
        return cls.from_transformers(block)

    def divide_experts(
        self,
        group: dist.ProcessGroup | None = None,
        experts_per_rank: Sequence[int] | None = None,
    ) -> Self:
        """Keep this rank's part of the experts only; every rank of ``group`` calls this.

        Args:
            group: The ranks; None for the default group.
            experts_per_rank: How many experts each keeps; None for as even as can be.

        Returns:
            The layer itself, whose ``experts`` are now a ``ParallelExperts``.
        """
        self.experts = ParallelExperts.from_experts(
            self.experts, group=group, experts_per_rank=experts_per_rank
        )
        return self

    def forward(
        self, x: Tensor, return_router_logits: bool = False, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Routing]:
        """Return the layer's output for ``x``, and what the router decided if asked.

        Args:
            x: [..., H], dtype of the parameters; any number of tokens, zero included.
            return_router_logits: Also return the logits.
            return_routing: Also return the ``Routing`` instead, whose logits and ids the losses in
                ``mergeme_ext.moe.losses`` take.

        Returns:
            [..., H], new, contiguous, dtype of ``x``; or a pair of it and the logits [..., E] or
            the routing of the T tokens in a row.
        """
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.router(tokens)
        logits, topk_ids, topk_weights = routing
        if topk_weights.dtype != torch.float64 and x.dtype == torch.float64:
            topk_weights = topk_weights.double()
        out = self.experts(tokens, topk_ids, topk_weights, **self._limit(topk_weights))
        if self.shared_expert is not None:
            shared = self.shared_expert(tokens)
            if self.shared_expert_gate is not None:
                shared = self.shared_expert_gate(tokens).sigmoid() * shared
            out = out + shared
        out = out.view(x.shape)
        if return_routing:
            return out, routing
        return (out, logits.view(*x.shape[:-1], logits.shape[-1])) if return_router_logits else out

    def _limit(self, topk_weights: Tensor) -> dict[str, int | Tensor | None]:
        if self.capacity_factor is None:
            return {}
        share = topk_weights.numel() / self.router.weight.shape[0]
        priority = None
        if self.drop_policy != "order":
            priority = topk_weights.detach()
        if self.drop_policy == "token":
            priority = priority.amax(1, keepdim=True).expand_as(priority)
        return {"capacity": math.ceil(self.capacity_factor * share), "priority": priority}

    def extra_repr(self) -> str:
        """Options, for ``print(module)``."""
        return f"capacity_factor={self.capacity_factor}, drop_policy={self.drop_policy}"


def _rename(
    layer: MoELayer, state_dict: MutableMapping[str, Tensor], prefix: str, *unused: object
) -> None:
    for theirs, ours in RENAMED.items():
        if prefix + theirs in state_dict and prefix + ours not in state_dict:
            state_dict[prefix + ours] = state_dict.pop(prefix + theirs)


def check_silu(experts: nn.Module) -> None:
    """Raise ValueError unless ``experts.act_fn`` is SiLU, the one activation the op knows."""
    probe = torch.tensor([-1.0, 0.5, 2.0])
    if not torch.allclose(experts.act_fn(probe), nn.functional.silu(probe)):
        raise ValueError(
            f"expected experts with the activation silu, got {type(experts.act_fn).__name__}"
        )

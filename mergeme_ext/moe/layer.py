"""The Mixture-of-Experts layer: a router and its experts."""

from typing import Self

import torch
from torch import Tensor, nn

from mergeme_ext.moe.experts import Experts
from mergeme_ext.moe.router import TopKRouter

__all__ = ["MoELayer"]


class MoELayer(nn.Module):
    """Sends each token through ``top_k`` of ``num_experts`` gated MLPs and sums their outputs.

    Args:
        hidden_size: H.
        intermediate_size: I, of one expert.
        num_experts: E.
        top_k: K in [1, E].
        score: "softmax" or "sigmoid".
        renormalize: Divide a token's K weights by their sum.
        scale: Dimensionless factor on the weights.
        selection_bias: Hold ``router.selection_bias`` [E], used to choose experts only.
        device: Where the parameters live.
        dtype: Their dtype.

    Parameters: ``router.weight`` [E, H], ``experts.gate_up_proj`` [E, 2I, H] (gate rows first) and
    ``experts.down_proj`` [E, H, I].

    Source: Mixtral, arXiv:2401.04088 (the default options); MergeME, arXiv:2502.00997, section 3.1.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        score: str = "softmax",
        renormalize: bool = True,
        scale: float = 1.0,
        selection_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.router = TopKRouter(
            hidden_size,
            num_experts,
            top_k,
            score=score,
            renormalize=renormalize,
            scale=scale,
            selection_bias=selection_bias,
            **where,
        )
        self.experts = Experts(hidden_size, intermediate_size, num_experts, **where)

    @classmethod
    def from_mixtral(cls, block: nn.Module) -> Self:
        """Return a layer that shares the parameters of transformers' ``MixtralSparseMoeBlock``.

        Args:
            block: Has ``gate.weight`` [E, H], ``gate.top_k``, ``experts.gate_up_proj`` [E, 2I, H],
                ``experts.down_proj`` [E, H, I] and the activation ``experts.act_fn``.

        Returns:
            The layer; its parameters are the block's own, so training one trains the other. The
            block's training-time jitter of the inputs is left out.

        Raises:
            TypeError: ``block`` lacks one of these, as in transformers before version 5.
            ValueError: The activation is not SiLU.
        """
        try:
            gate, experts = block.gate, block.experts
            weight, top_k = gate.weight, gate.top_k
            gate_up_proj, down_proj = experts.gate_up_proj, experts.down_proj
        except AttributeError as error:
            raise TypeError(
                "MoELayer.from_mixtral: expected a MixtralSparseMoeBlock of transformers 5, "
                f"got {type(block).__name__}: {error}"
            ) from None
        check_silu(experts)
        num_experts, hidden_size, intermediate_size = down_proj.shape
        layer = cls(hidden_size, intermediate_size, num_experts, top_k, device="meta")
        layer.router.weight = weight
        layer.experts.gate_up_proj, layer.experts.down_proj = gate_up_proj, down_proj
        return layer.train(block.training)

    def forward(
        self, x: Tensor, return_router_logits: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the layer's output for ``x``, and the router's logits if asked.

        Args:
            x: [..., H], dtype of the parameters; any number of tokens, zero included.
            return_router_logits: Also return the logits.

        Returns:
            [..., H], new, contiguous, dtype of ``x``; with ``return_router_logits`` a pair of it
            and [..., E].
        """
        tokens = x.reshape(-1, x.shape[-1])
        logits, topk_ids, topk_weights = self.router(tokens)
        out = self.experts(tokens, topk_ids, topk_weights).view(x.shape)
        return (out, logits.view(*x.shape[:-1], logits.shape[-1])) if return_router_logits else out


def check_silu(experts: nn.Module) -> None:
    """Raise ValueError unless ``experts.act_fn`` is SiLU, the one activation the op knows."""
    probe = torch.tensor([-1.0, 0.5, 2.0])
    if not torch.allclose(experts.act_fn(probe), nn.functional.silu(probe)):
        raise ValueError(
            f"expected experts with the activation silu, got {type(experts.act_fn).__name__}"
        )

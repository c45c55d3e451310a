"""The experts' gated MLPs, packed in two tensors and run by one fused op."""

import torch
from torch import Tensor, nn

from mergeme_ext.ops import grouped_experts, sort_by_expert

__all__ = ["Experts", "run_experts"]


def run_experts(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, topk_ids: Tensor, topk_weights: Tensor
) -> Tensor:
    """Return, for each token of ``x``, the weighted sum of its experts' outputs.

    Args:
        x: Tokens [T, H], floating.
        gate_up_proj: [E, 2I, H], dtype of ``x``: gate rows first, then up rows.
        down_proj: [E, H, I], dtype of ``x``.
        topk_ids: int32 [T, K], each in [0, E).
        topk_weights: [T, K], float32 (float64 with float64 ``x``).

    Returns:
        [T, H], new, contiguous, dtype of ``x``; summed in float32 (float64 for float64) over k in
        order and rounded once.

    Source: Mixtral, arXiv:2401.04088, section 2.
    """
    expert_offsets, permutation, inverse = sort_by_expert(topk_ids, gate_up_proj.shape[0])
    return grouped_experts(
        x, gate_up_proj, down_proj, topk_weights, expert_offsets, permutation, inverse
    )


class Experts(nn.Module):
    """E gated MLPs ``down(silu(gate x) * up x)``, packed as transformers packs them in memory.

    Args:
        hidden_size: H.
        intermediate_size: I.
        num_experts: E.
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(hidden_size, intermediate_size, num_experts) < 1:
            raise ValueError(
                "Experts: expected hidden_size, intermediate_size and num_experts to be positive, "
                f"got {hidden_size}, {intermediate_size} and {num_experts}"
            )
        where = {"device": device, "dtype": dtype}
        self.gate_up_proj = nn.Parameter(
            torch.empty(num_experts, 2 * intermediate_size, hidden_size, **where)
        )
        self.down_proj = nn.Parameter(
            torch.empty(num_experts, hidden_size, intermediate_size, **where)
        )
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw both weights from a normal distribution."""
        nn.init.normal_(self.gate_up_proj, std=std)
        nn.init.normal_(self.down_proj, std=std)

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Return [T, H]: see ``run_experts``."""
        return run_experts(x, self.gate_up_proj, self.down_proj, topk_ids, topk_weights)

    def extra_repr(self) -> str:
        """Sizes, for ``print(module)``."""
        num_experts, hidden_size, intermediate_size = self.down_proj.shape
        return (
            f"hidden_size={hidden_size}, intermediate_size={intermediate_size}, "
            f"num_experts={num_experts}"
        )

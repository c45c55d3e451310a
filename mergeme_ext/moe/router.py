"""Token-level router: one linear map, then top-k gating."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mergeme_ext.ops import topk_gating

__all__ = ["TopKRouter"]

SCORES = ("softmax", "sigmoid")


class TopKRouter(nn.Module):
    """Picks ``top_k`` experts per token and weighs them.

    Logits are ``x @ weight.T`` in the dtype of ``x``; scores, selection and weights are formed
    in float32 (float64 for float64 logits), as stock Mixtral does. Ties go to the lower expert.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K in [1, E].
        score: "softmax" over all E logits, or "sigmoid" of each.
        renormalize: Divide the K weights by their sum.
        scale: Dimensionless factor on the weights, after renormalising.
        selection_bias: Hold a float32 buffer ``selection_bias`` [E], zeros at first, added to the
            scores for the choice of experts only; the weights come from the unbiased scores.
        device: Where the parameters live.
        dtype: Their dtype.

    Source: Shazeer et al. 2017, arXiv:1701.06538; Mixtral, arXiv:2401.04088; selection bias from
    Wang et al. 2024, arXiv:2408.15664.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score: str = "softmax",
        renormalize: bool = True,
        scale: float = 1.0,
        selection_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden_size < 1 or num_experts < 1:
            raise ValueError(
                f"TopKRouter: expected hidden_size and num_experts to be positive, "
                f"got {hidden_size} and {num_experts}"
            )
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"TopKRouter: expected top_k in [1, num_experts = {num_experts}], got {top_k}"
            )
        if score not in SCORES:
            raise ValueError(f"TopKRouter: expected score to be one of {SCORES}, got {score!r}")
        self.top_k, self.score, self.renormalize, self.scale = top_k, score, renormalize, scale
        self.weight = nn.Parameter(
            torch.empty(num_experts, hidden_size, device=device, dtype=dtype)
        )
        bias = torch.zeros(num_experts, device=device) if selection_bias else None
        self.register_buffer("selection_bias", bias)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the weight from a normal distribution; a selection bias goes back to zero."""
        nn.init.normal_(self.weight, std=std)
        if self.selection_bias is not None:
            nn.init.zeros_(self.selection_bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits of ``x`` and the experts and weights they lead to.

        Args:
            x: Tokens [T, H].

        Returns:
            ``(logits, topk_ids, topk_weights)``: [T, E] in the dtype of ``x``; int32 [T, K] by
            falling score; float32 [T, K] (float64 for float64 logits).
        """
        logits = F.linear(x, self.weight)
        # A module-wide cast to a half type takes buffers along; the op wants float32.
        bias = None if self.selection_bias is None else self.selection_bias.float()
        topk_ids, topk_weights = topk_gating(
            logits,
            bias,
            self.top_k,
            score=self.score,
            renormalize=self.renormalize,
            scale=self.scale,
        )
        return logits, topk_ids, topk_weights

    def extra_repr(self) -> str:
        """Sizes and options, for ``print(module)``."""
        num_experts, hidden_size = self.weight.shape
        return (
            f"hidden_size={hidden_size}, num_experts={num_experts}, top_k={self.top_k}, "
            f"score={self.score}, renormalize={self.renormalize}, scale={self.scale}, "
            f"selection_bias={self.selection_bias is not None}"
        )

"""Token-level router: one linear map, then top-k gating."""

from collections.abc import Callable
from typing import NamedTuple, Self, TypedDict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mergeme_ext.ops import topk_gating

__all__ = ["RouterOptions", "Routing", "TopKRouter"]

SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "none")
GROUP_SCORES = ("max", "top2")


class Routing(NamedTuple):
    """What a router decided for T tokens.

    ``logits`` [T, E]; ``topk_ids`` int32 [T, K], by falling score; ``topk_weights`` [T, K], float32
    (float64 for float64 logits).
    """

    logits: Tensor
    topk_ids: Tensor
    topk_weights: Tensor


class RouterOptions(TypedDict, total=False):
    """The keyword options of ``TopKRouter``, which says what they mean."""

    score: str
    renormalize: bool
    scale: float
    selection_bias: bool
    num_groups: int
    top_groups: int
    group_score: str
    jitter: float
    compute_dtype: torch.dtype | None


class TopKRouter(nn.Module):
    """Picks ``top_k`` experts per token and weighs them.

    Logits are ``x @ weight.T`` in the dtype of ``x``, or a wider one; scores, selection and weights
    are formed in float32 (float64 for float64 logits), as stock Mixtral does. Ties go to the lower
    expert.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K in [1, E].
        score: "softmax" over all E logits, or of each "sigmoid", "sqrtsoftplus" or "none".
        renormalize: Divide the K weights by their sum.
        scale: Dimensionless factor on the weights, after renormalising.
        selection_bias: Hold a float32 buffer ``selection_bias`` [E], zeros at first, added to the
            scores for the choice of experts only; the weights come from the unbiased scores.
            Training counts each expert's tokens in ``expert_counts`` [E], which
            ``update_selection_bias`` balances by.
        num_groups: G, a divisor of E: a group is E / G experts in a row.
        top_groups: Choose from this many groups only, those of the greatest group score.
        group_score: Of a group: "max", its largest score plus bias, or "top2", the sum of its two
            largest.
        jitter: In training, multiply the router's input by uniform noise in
            [1 - jitter, 1 + jitter].
        compute_dtype: Form the logits in this dtype where it is wider than that of ``x``
            (``torch.float32``, as DeepSeek does); None for the dtype of ``x``.
        device: Where the parameters live.
        dtype: Their dtype.

    Source: Shazeer et al. 2017, arXiv:1701.06538; Mixtral, arXiv:2401.04088; selection bias from
    Wang et al. 2024, arXiv:2408.15664; groups from DeepSeek-V2 and V3, arXiv:2405.04434 and
    arXiv:2412.19437; jitter and a float32 router from Switch, Fedus et al. 2021, arXiv:2101.03961.
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
        num_groups: int = 1,
        top_groups: int = 1,
        group_score: str = "max",
        jitter: float = 0.0,
        compute_dtype: torch.dtype | None = None,
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
        if group_score not in GROUP_SCORES:
            raise ValueError(
                f"TopKRouter: expected group_score to be one of {GROUP_SCORES}, got {group_score!r}"
            )
        if num_groups < 1 or num_experts % num_groups:
            raise ValueError(
                f"TopKRouter: expected num_groups to divide num_experts = {num_experts}, "
                f"got {num_groups}"
            )
        if not 1 <= top_groups <= num_groups or top_groups * num_experts // num_groups < top_k:
            raise ValueError(
                f"TopKRouter: expected top_groups in [1, num_groups = {num_groups}] whose experts "
                f"are at least top_k = {top_k}, got {top_groups}"
            )
        if not 0 <= jitter < 1:
            raise ValueError(f"TopKRouter: expected jitter in [0, 1), got {jitter}")
        self.top_k, self.score, self.renormalize, self.scale = top_k, score, renormalize, scale
        self.num_groups, self.top_groups, self.group_score = num_groups, top_groups, group_score
        self.jitter, self.compute_dtype = jitter, compute_dtype
        self.weight = nn.Parameter(
            torch.empty(num_experts, hidden_size, device=device, dtype=dtype)
        )
        bias = torch.zeros(num_experts, device=device) if selection_bias else None
        self.register_buffer("selection_bias", bias)
        counts = torch.zeros(num_experts, device=device, dtype=torch.int64)
        self.register_buffer("expert_counts", counts if selection_bias else None, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the weight from a normal distribution; a selection bias goes back to zero."""
        nn.init.normal_(self.weight, std=std)
        if self.selection_bias is not None:
            self.selection_bias.zero_()
            self.expert_counts.zero_()

    def forward(self, x: Tensor) -> Routing:
        """Return the logits of ``x`` and the experts and weights they lead to.

        Args:
            x: Tokens [T, H].

        Returns:
            The logits in the dtype of ``x`` or ``compute_dtype``, ids and weights.
        """
        weight = self.weight
        if self.compute_dtype is not None:
            wide = torch.promote_types(x.dtype, self.compute_dtype)
            x, weight = x.to(wide), weight.to(wide)
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = F.linear(x, weight)
        # A loaded bias can be of a half type; the op wants float32.
        bias = None if self.selection_bias is None else self.selection_bias.float()
        topk_ids, topk_weights = topk_gating(
            logits,
            bias,
            self.top_k,
            score=self.score,
            renormalize=self.renormalize,
            scale=self.scale,
            num_groups=self.num_groups,
            top_groups=self.top_groups,
            group_score=self.group_score,
        )
        if self.training and self.expert_counts is not None:
            chosen = topk_ids.detach().reshape(-1).to(torch.int64)
            self.expert_counts.scatter_add_(0, chosen, torch.ones_like(chosen))
        return Routing(logits, topk_ids, topk_weights)

    @torch.no_grad()
    def update_selection_bias(
        self, rate: float = 0.001, group: dist.ProcessGroup | None = None
    ) -> None:
        """Raise the bias of experts with few tokens and lower that of those with many.

        ``selection_bias[e] += rate * sign(mean(counts) - counts[e])`` over the tokens counted since
        the last call, in training; the counts then start anew. Call it once per optimiser step.

        Args:
            rate: The papers' u (or gamma), dimensionless like the scores.
            group: Add up the counts of these ranks first, so that all make the same step; every
                rank calls this. None for this process alone.

        Raises:
            ValueError: The router has no selection bias.

        Source: Wang et al. 2024, arXiv:2408.15664, algorithm 1.
        """
        if self.selection_bias is None:
            raise ValueError(
                "TopKRouter.update_selection_bias: expected a router with selection_bias=True"
            )
        counts = self.expert_counts
        if group is not None:
            dist.all_reduce(counts, group=group)
        # sign(sum - E * count) is sign(mean - count), in integers.
        self.selection_bias += rate * (counts.sum() - counts.numel() * counts).sign()
        counts.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A cast of the module to a half type leaves the bias in float32: its steps are small.
        bias = self.selection_bias
        super()._apply(fn, recurse)
        if bias is not None and self.selection_bias.dtype != bias.dtype:
            self.selection_bias = bias.to(self.selection_bias.device)
        return self

    def extra_repr(self) -> str:
        """Sizes and options, for ``print(module)``."""
        num_experts, hidden_size = self.weight.shape
        return (
            f"hidden_size={hidden_size}, num_experts={num_experts}, top_k={self.top_k}, "
            f"score={self.score}, renormalize={self.renormalize}, scale={self.scale}, "
            f"selection_bias={self.selection_bias is not None}, "
            f"groups={self.top_groups}/{self.num_groups}"
        )

"""Experts and linear layers whose weights are e4m3 with a scale for each 128 x 128: inference."""

import torch
from torch import Tensor, nn

from mergeme_ext.moe.experts import ACTIVATIONS
from mergeme_ext.ops import grouped_experts_fp8, grouped_matmul_fp8, quantize_fp8, sort_by_expert

__all__ = ["Float8Experts", "linear_float8", "multiply_float8", "scale_shape"]

BLOCK = 128


def scale_shape(rows: int, columns: int) -> tuple[int, int]:
    """Return how many blocks of 128 x 128 a weight [rows, columns] has each way."""
    return -(-rows // BLOCK), -(-columns // BLOCK)


def multiply_float8(x: Tensor, weight: Tensor, scale: Tensor, expert_offsets: Tensor) -> Tensor:
    """Return each expert's rows of ``x`` times its weight, with ``x`` quantised on the way.

    Args:
        x: [M, K], float32, bfloat16 or float16; rows sorted by expert.
        weight: float8_e4m3fn [E, N, K].
        scale: float32 [E, ceil(N / 128), ceil(K / 128)].
        expert_offsets: int32 [E + 1].

    Returns:
        [M, N], new, dtype of ``x``, zero in the rows of no expert.
    """
    q, q_scale = quantize_fp8(x)
    return grouped_matmul_fp8(q, q_scale, weight, scale, expert_offsets, dtype=x.dtype)


def linear_float8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ (weight * scale).T + bias``, computed in e4m3: a linear layer as one expert.

    Args:
        x: [..., K], float32, bfloat16 or float16.
        weight: float8_e4m3fn [N, K].
        scale: float32 [ceil(N / 128), ceil(K / 128)].
        bias: [N], or None.

    Returns:
        [..., N], new, dtype of ``x``.
    """
    rows = x.reshape(-1, x.shape[-1])
    offsets = torch.tensor([0, rows.shape[0]], dtype=torch.int32, device=x.device)
    out = multiply_float8(rows, weight[None], scale[None], offsets).view(
        *x.shape[:-1], weight.shape[0]
    )
    return out if bias is None else out + bias


class Float8Experts(nn.Module):
    """``Experts`` with e4m3 weights as DeepSeek-V3's checkpoints hold them, for inference.

    Args:
        hidden_size: H.
        intermediate_size: I.
        num_experts: E.
        activation: "silu", "gelu" (exact, by erf) or "gelu_tanh".
        device: Where the parameters live.

    Parameters, none of which has a gradient: ``gate_up_proj`` [E, 2I, H], gate rows first, and
    ``down_proj`` [E, H, I], float8_e4m3fn; ``gate_up_proj_scale_inv``
    [E, 2 * ceil(I / 128), ceil(H / 128)], the scales of gate first, and ``down_proj_scale_inv``
    [E, ceil(H / 128), ceil(I / 128)], float32, by which e4m3 is multiplied. They begin as zeros.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        activation: str = "silu",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if min(hidden_size, intermediate_size, num_experts) < 1:
            raise ValueError(
                "Float8Experts: expected hidden_size, intermediate_size and num_experts to be "
                f"positive, got {hidden_size}, {intermediate_size} and {num_experts}"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"Float8Experts: expected activation to be one of {ACTIVATIONS}, got {activation!r}"
            )
        self.activation, self.num_experts = activation, num_experts
        rows, columns = scale_shape(intermediate_size, hidden_size)
        shapes = {
            "gate_up_proj": (2 * intermediate_size, hidden_size),
            "gate_up_proj_scale_inv": (2 * rows, columns),
            "down_proj": (hidden_size, intermediate_size),
            "down_proj_scale_inv": (columns, rows),
        }
        for name, shape in shapes.items():
            dtype = torch.float32 if name.endswith("scale_inv") else torch.float8_e4m3fn
            zeros = torch.zeros(num_experts, *shape, device=device).to(dtype)
            self.register_parameter(name, nn.Parameter(zeros, requires_grad=False))

    def forward(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, *, sentinel: bool = False
    ) -> Tensor:
        """Return, for each token, the weighted sum of its experts' outputs.

        Args:
            x: Tokens [T, H], float32, bfloat16 or float16.
            topk_ids: int32 [T, K], each in [0, E).
            topk_weights: float32 [T, K].
            sentinel: Whether an id may also be E, for no expert.

        Returns:
            [T, H], new, dtype of ``x``.
        """
        routing = sort_by_expert(topk_ids, self.num_experts, sentinel=sentinel)
        return grouped_experts_fp8(
            x,
            self.gate_up_proj,
            self.gate_up_proj_scale_inv,
            self.down_proj,
            self.down_proj_scale_inv,
            topk_weights,
            *routing,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        """Sizes, for ``print(module)``."""
        _, hidden_size, intermediate_size = self.down_proj.shape
        return (
            f"hidden_size={hidden_size}, intermediate_size={intermediate_size}, "
            f"num_experts={self.num_experts}, activation={self.activation}"
        )

"""The expert that every token goes through, beside those that the router picks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SharedExpert"]


class SharedExpert(nn.Module):
    """One gated MLP ``down(f(gate x) * up x)``.

    Args:
        hidden_size: H.
        intermediate_size: I of this expert.
        activation: f: "silu", "gelu" (exact, by erf) or "gelu_tanh".
        device: Where the parameters live.
        dtype: Their dtype.

    Parameters: ``gate_proj.weight`` and ``up_proj.weight`` [I, H], ``down_proj.weight`` [H, I].

    Source: DeepSeekMoE, Dai et al. 2024, arXiv:2401.06066, section 3.2.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if intermediate_size < 1:
            raise ValueError(
                f"SharedExpert: expected intermediate_size to be positive, got {intermediate_size}"
            )
        options = {"bias": False, "device": device, "dtype": dtype}
        self.activation = activation
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, **options)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, **options)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, **options)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the weights from a normal distribution."""
        for linear in (self.gate_proj, self.up_proj, self.down_proj):
            nn.init.normal_(linear.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP of ``x`` [..., H]."""
        gate = self.gate_proj(x)
        if self.activation == "silu":
            gate = F.silu(gate)
        else:
            gate = F.gelu(gate, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return self.down_proj(gate * self.up_proj(x))

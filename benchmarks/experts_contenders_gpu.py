"""Who computes the experts on a GPU: ours, torch, transformers, and what else is installed.

The same interface as benchmarks.experts_contenders, with all tensors on the GPU. Libraries are
found by importing them; one that is missing, refuses or computes something else is reported with
the reason. Their calls are written after their public interfaces and have not run on a GPU here.
"""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.experts_contenders import (
    Contender,
    Grouped,
    Missing,
    TorchGroupedMM,
    Transformers,
)
from benchmarks.moe_cases import Inputs, Weights

__all__ = ["CONTENDERS", "PREDICTED", "need", "padded_rows"]


def need(module: str):
    """An installed module.

    Raises:
        Missing: It cannot be imported; the message says why.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken installation is as good as none
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Missing(f"{module}: {reason}") from error


class _Library(Contender):
    """A library's experts on the weights as given, or as it wants them once per model."""

    def load(self, weights: Weights, threads: int) -> None:
        self._weights = weights

    def forward(self, inputs: Inputs) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad():
                return self._layer(inputs.x, inputs.topk_ids, inputs.topk_weights)

        return call

    def _layer(self, x: Tensor, ids: Tensor, mix: Tensor) -> Tensor:
        raise NotImplementedError


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _weighted_sum(rows: Tensor, place: Tensor, mix: Tensor) -> Tensor:
    """out[t] = sum over k of mix[t, k] * rows[place[t * K + k]]."""
    return (rows[place].view(*mix.shape, -1) * mix[..., None].to(rows.dtype)).sum(1)


class Vllm(_Library):
    """vLLM's Triton kernels over sorted ids."""

    def load(self, weights: Weights, threads: int) -> None:
        super().load(weights, threads)
        self._run = need("vllm.model_executor.layers.fused_moe").fused_experts

    def _layer(self, x, ids, mix):
        return self._run(x, self._weights.gate_up, self._weights.down, mix, ids.int())


class SonicMoe(_Library):
    """SonicMoE: gather in the load, SwiGLU in the epilogue."""

    def load(self, weights: Weights, threads: int) -> None:
        super().load(weights, threads)
        self._run = need("sonicmoe.functional").moe_general_routing_inputs
        self._swiglu = need("sonicmoe.enums").ActivationType.SWIGLU
        self._experts, _, intermediate = weights.down.shape
        # Gate and up rows take turns there; [2I, H, E] and [H, I, E] as views.
        pairs = weights.gate_up.view(self._experts, 2, intermediate, -1).transpose(1, 2)
        self._gate_up = pairs.reshape(weights.gate_up.shape).permute(1, 2, 0)
        self._down = weights.down.permute(1, 2, 0)

    def _layer(self, x, ids, mix):
        tokens = torch.arange(ids.numel(), dtype=torch.int32, device=x.device) // ids.shape[1]
        out, _ = self._run(
            x, mix.reshape(-1), tokens, ids.reshape(-1).int(), self._gate_up, None, self._down,
            None, self._experts, torch.cuda.current_stream().cuda_stream, self._swiglu, True,
        )  # fmt: skip
        return out


class ScatterMoe(_Library):
    """ScatterMoE: gather and scatter inside Triton tiles."""

    def load(self, weights: Weights, threads: int) -> None:
        self._module = need("scattermoe.parallel_experts")
        self._gate_up, self._down = (w.transpose(1, 2) for w in (weights.gate_up, weights.down))

    def _layer(self, x, ids, mix):
        order = self._module.flatten_sort_count(ids, num_experts=self._down.shape[0])
        h = self._module.parallel_linear(x, self._gate_up, ids.shape[1], *order, grouped_out=True)
        return self._module.parallel_linear(
            _swiglu(h), self._down, 1, *order, grouped_in=True, gates=mix.to(x.dtype)
        )


class MegaBlocks(_Library):
    """The grouped product that MegaBlocks uses (package grouped_gemm), with torch around it."""

    def load(self, weights: Weights, threads: int) -> None:
        super().load(weights, threads)
        need("megablocks")
        self._gmm = need("grouped_gemm").ops.gmm

    def _layer(self, x, ids, mix):
        experts = self._weights.down.shape[0]
        sorted_ids, slot = ids.reshape(-1).sort(stable=True)
        counts = torch.bincount(sorted_ids, minlength=experts).cpu()  # it takes them from the host
        h = self._gmm(x[slot // ids.shape[1]], self._weights.gate_up, counts, trans_b=True)
        y = self._gmm(_swiglu(h), self._weights.down, counts, trans_b=True)
        place = torch.empty_like(slot)
        place[slot] = torch.arange(slot.numel(), device=slot.device)
        return _weighted_sum(y, place, mix)


def padded_rows(ids: Tensor, experts: int, alignment: int) -> tuple[Tensor, Tensor]:
    """(place of every slot, expert of every row) where each expert's rows begin at a multiple.

    Rows of no slot belong to the expert before them, those at the end to none (-1). Nothing waits
    for the device: there are as many rows as any routing can need.
    """
    flat = ids.reshape(-1)
    counts = torch.bincount(flat, minlength=experts)
    padded = (counts + alignment - 1) // alignment * alignment
    ends = padded.cumsum(0)
    starts, first = ends - padded, counts.cumsum(0) - counts
    slot = flat.argsort(stable=True)
    place = torch.empty_like(slot)
    ranks = torch.arange(flat.numel(), device=ids.device)
    place[slot] = starts[flat[slot]] + ranks - first[flat[slot]]
    rows = (
        -(-(flat.numel() + min(experts, flat.numel()) * (alignment - 1)) // alignment) * alignment
    )
    row = torch.arange(rows, device=ids.device)
    owner = torch.searchsorted(ends, row, right=True)
    return place, torch.where(owner < experts, owner, -1).int()


class DeepGemm(_Library):
    """DeepGEMM's grouped bfloat16 products over padded groups, with torch around them."""

    def load(self, weights: Weights, threads: int) -> None:
        super().load(weights, threads)
        self._module = need("deep_gemm")
        if not hasattr(self._module, "m_grouped_bf16_gemm_nt_contiguous"):
            raise Missing("deep_gemm has no grouped bfloat16 product")
        if weights.down.dtype != torch.bfloat16:
            raise Missing("bfloat16 only")
        alignment = getattr(self._module, "get_m_alignment_for_contiguous_layout", lambda: 128)
        self._alignment = int(alignment())

    def _product(self, rows: Tensor, weight: Tensor, owner: Tensor) -> Tensor:
        out = rows.new_empty(rows.shape[0], weight.shape[1])
        self._module.m_grouped_bf16_gemm_nt_contiguous(rows, weight, out, owner)
        return out

    def _layer(self, x, ids, mix):
        place, owner = padded_rows(ids, self._weights.down.shape[0], self._alignment)
        rows = x.new_zeros(owner.numel(), x.shape[1])
        rows[place] = x.repeat_interleave(ids.shape[1], dim=0)
        h = _swiglu(self._product(rows, self._weights.gate_up, owner))
        return _weighted_sum(self._product(h, self._weights.down, owner), place, mix)


# The first is ours, the others are compared with it.
CONTENDERS: dict[str, Callable[[], Contender]] = {
    "grouped_experts": Grouped,
    "torch_grouped_mm": TorchGroupedMM,
    "transformers_eager": lambda: Transformers("eager"),
    "transformers_grouped_mm": lambda: Transformers("grouped_mm"),
    "transformers_batched_mm": lambda: Transformers("batched_mm"),
    "vllm": Vllm,
    "sonicmoe": SonicMoe,
    "scattermoe": ScatterMoe,
    "megablocks": MegaBlocks,
    "deep_gemm": DeepGemm,
}
PREDICTED = "grouped_experts"  # what benchmarks.gpu_model predicts

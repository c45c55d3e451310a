"""Who computes the experts: ours, torch, transformers, vLLM's op, SGLang's, kt-kernel.

Every contender takes the same weights [E, 2I, H] and [E, H, I] and the same routing (topk_ids,
topk_weights); what it makes of them per call, such as sorting by expert, is part of its time, what
it makes once per model, such as packing weights, is not.
"""

import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.moe_cases import SHAPES, Case, Inputs, Weights

__all__ = ["CONTENDERS", "Contender", "Missing", "find"]

# Copies of weights or of their gradients that a call may make; a call with more takes half a
# minute and says nothing.
COPIED_BYTES = 4 << 30


class Missing(Exception):
    """A contender cannot run a case; the message says why."""


class Contender(ABC):
    """One way to compute the layer.

    ``isolated`` ones run in a process of their own: they may end it, and each brings libraries that
    do not go together with others'.
    """

    isolated = False
    trains = False
    # Copies of a layer's weights that loading takes at most, beside the one that all share.
    copies = 0
    variant = ""

    def refuse(self, case: Case) -> None:
        """Raise Missing where the contender is known not to serve ``case``."""
        if case.mode == "training" and not self.trains:
            raise Missing("no backward")

    @abstractmethod
    def load(self, weights: Weights, threads: int) -> None:
        """Take the weights of a layer, and whatever is done once with them."""

    @abstractmethod
    def forward(self, inputs: Inputs) -> Callable[[], Tensor]:
        """Return the call to time; it gives [T, H]."""

    def training(self, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        """Return the call to time; it gives the gradients of x, gate_up, down and the weights."""
        raise NotImplementedError


class _Differentiable(Contender):
    """A contender that is a function of tensors which autograd can follow."""

    trains = True

    def load(self, weights: Weights, threads: int) -> None:
        self.weights = weights

    @abstractmethod
    def prepare(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The routing in the dtypes that the contender takes."""

    @abstractmethod
    def function(self, x, gate_up, down, *routing) -> Tensor: ...

    def forward(self, inputs: Inputs) -> Callable[[], Tensor]:
        routing = self.prepare(inputs)

        def call() -> Tensor:
            with torch.no_grad():
                return self.function(inputs.x, self.weights.gate_up, self.weights.down, *routing)

        return call

    def training(self, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        ids, mix = self.prepare(inputs)

        def call() -> tuple[Tensor, ...]:
            tensors = (inputs.x, self.weights.gate_up, self.weights.down, mix)
            leaves = [t.detach().requires_grad_() for t in tensors]
            out = self.function(leaves[0], leaves[1], leaves[2], ids, leaves[3])
            return torch.autograd.grad(out, leaves, inputs.grad)

        return call


class Grouped(_Differentiable):
    """Our fused op over the weights as transformers keeps them."""

    def prepare(self, inputs: Inputs) -> tuple[Tensor, ...]:
        return inputs.topk_ids.int(), inputs.topk_weights

    def function(self, x, gate_up, down, ids, mix) -> Tensor:
        from mergeme_ext.ops import grouped_experts, sort_by_expert

        return grouped_experts(x, gate_up, down, mix, *sort_by_expert(ids, gate_up.shape[0]))


class Packed(Contender):
    """Our op over packed weights."""

    copies = 1

    def load(self, weights: Weights, threads: int) -> None:
        import mergeme_ext.ops as ops

        if not hasattr(ops, "packed_experts"):
            raise RuntimeError("this build of mergeme_ext has no packed_experts")
        self._ops = ops
        self._gate_up = ops.pack_experts(weights.gate_up, gated=True)
        self._down = ops.pack_experts(weights.down)
        self._sizes = weights.down.shape[0], weights.down.shape[2]

    def forward(self, inputs: Inputs) -> Callable[[], Tensor]:
        ids, (num_experts, intermediate) = inputs.topk_ids.int(), self._sizes

        def call() -> Tensor:
            routing = self._ops.sort_by_expert(ids, num_experts)
            return self._ops.packed_experts(
                inputs.x,
                self._gate_up,
                self._down,
                inputs.topk_weights,
                *routing,
                intermediate=intermediate,
                activation="silu",
            )

        return call


class TorchGroupedMM(_Differentiable):
    """``torch.nn.functional.grouped_mm`` with as few steps around it as it takes."""

    def prepare(self, inputs: Inputs) -> tuple[Tensor, ...]:
        return inputs.topk_ids, inputs.topk_weights

    def function(self, x, gate_up, down, ids, mix) -> Tensor:
        grouped_mm = torch.nn.functional.grouped_mm
        experts, top_k = gate_up.shape[0], ids.shape[1]
        sorted_ids, slot = ids.reshape(-1).sort()
        ends = torch.bincount(sorted_ids, minlength=experts).cumsum(0, dtype=torch.int32)
        h = grouped_mm(x[slot // top_k], gate_up.transpose(1, 2), offs=ends)
        gate, up = h.chunk(2, dim=-1)
        y = grouped_mm(torch.nn.functional.silu(gate) * up, down.transpose(1, 2), offs=ends)
        inverse = torch.empty_like(slot)
        inverse[slot] = torch.arange(slot.numel(), device=slot.device)
        by_slot = y[inverse].view(*ids.shape, -1)
        return (by_slot * mix[..., None]).sum(1).to(x.dtype)


class Transformers(_Differentiable):
    """An experts class of transformers under one of its implementations."""

    def __init__(self, implementation: str) -> None:
        self._implementation = implementation

    def refuse(self, case: Case) -> None:
        super().refuse(case)
        shape = SHAPES[case.shape]
        size = getattr(torch, case.dtype).itemsize
        copied, what = 0, ""
        if self._implementation == "batched_mm":
            slots = case.tokens * shape.top_k
            copied, what = slots * shape.weights // shape.experts * size, "weights"
        elif self._implementation == "eager" and case.mode == "training":
            # Each expert's slice of a weight gets a gradient of the whole weight's size.
            copied, what = shape.experts * shape.weights * size, "gradients"
        if copied > COPIED_BYTES:
            raise Missing(f"would make {copied / 2**30:.0f} GiB of {what} per call")

    def load(self, weights: Weights, threads: int) -> None:
        try:
            from transformers import Qwen3MoeConfig
            from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
        except ImportError as error:
            raise Missing(f"transformers: {error}") from error
        super().load(weights, threads)
        experts, hidden, intermediate = weights.down.shape
        config = Qwen3MoeConfig(
            num_experts=experts, hidden_size=hidden, moe_intermediate_size=intermediate
        )
        config._experts_implementation = self._implementation
        with torch.device("meta"):
            self._module = Qwen3MoeExperts(config)
        del self._module.gate_up_proj, self._module.down_proj

    def prepare(self, inputs: Inputs) -> tuple[Tensor, ...]:
        # Qwen3's router hands the weights over in the model's dtype.
        return inputs.topk_ids, inputs.topk_weights.to(inputs.x.dtype)

    def function(self, x, gate_up, down, ids, mix) -> Tensor:
        self._module.gate_up_proj, self._module.down_proj = gate_up, down
        return self._module(x, ids, mix)


def _package(name: str, peers: str | None) -> Path:
    """Folder of an installed package, without importing it."""
    if peers is not None:
        if (folder := Path(peers) / name).is_dir():
            return folder
        raise Missing(f"no {name} in the folder given as --peers")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise Missing(f"{name} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


class _Isolated(Contender):
    isolated = True
    copies = 2

    def __init__(self, peers: str | None = None) -> None:
        self._peers = peers


class _Vllm(_Isolated):
    def _load_library(self, name: str) -> None:
        path = _package("vllm", self._peers) / f"{name}.abi3.so"
        if not path.exists():
            raise Missing(f"vllm has no {path.name}")
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            raise Missing(f"{path.name}: {error}") from error


class VllmFused(_Vllm):
    """vLLM's own fused experts for CPUs."""

    def load(self, weights: Weights, threads: int) -> None:
        flags = _processor_flags()
        # The choice that vLLM's platform code makes, but for one thing: it takes the plain AVX-512
        # library where the processor does not name AVX512-BF16, even if the other one runs.
        if "avx512f" in flags:
            library = "_C" if "avx512_bf16" in flags else "_C_AVX512"
        else:
            library = "_C_AVX2"
        isa = "amx" if {"amx_tile", "amx_bf16"} <= flags else "vec"
        self._load_library(library)
        self.variant = f"{library} {isa}"
        self._isa = isa
        self._gate_up, self._down = self._pack(weights.gate_up), self._pack(weights.down)

    def _pack(self, weight: Tensor) -> Tensor:
        packed = torch.empty_like(weight)
        torch.ops._C.prepack_moe_weight(weight, packed, self._isa)
        return packed

    def forward(self, inputs: Inputs) -> Callable[[], Tensor]:
        ids, mix = inputs.topk_ids.int(), inputs.topk_weights

        def call() -> Tensor:
            out = torch.empty_like(inputs.x)
            torch.ops._C.cpu_fused_moe(
                out, inputs.x, self._gate_up, self._down, None, None, mix, ids, False, "silu",
                self._isa,
            )  # fmt: skip
            return out

        return call


class SglangFused(_Vllm):
    """SGLang's fused experts for CPUs, as vLLM ships them."""

    def load(self, weights: Weights, threads: int) -> None:
        self._load_library("_C")
        if weights.down.dtype == torch.float32:
            raise Missing("the op takes half types only")
        self._gate_up = torch.ops._C.convert_weight_packed(weights.gate_up)
        self._down = torch.ops._C.convert_weight_packed(weights.down)

    def forward(self, inputs: Inputs) -> Callable[[], Tensor]:
        ids, mix, rest = inputs.topk_ids.int(), inputs.topk_weights, [None] * 10

        def call() -> Tensor:
            out = torch.empty_like(inputs.x)
            torch.ops._C.fused_experts_cpu(
                out, inputs.x, self._gate_up, self._down, mix, ids, 0, *rest, True
            )
            return out

        return call


class KtKernel(_Isolated):
    """KTransformers' experts for CPUs."""

    def load(self, weights: Weights, threads: int) -> None:
        if weights.down.dtype != torch.bfloat16:
            raise Missing("of unquantised weights it takes bfloat16 only")
        folder = _package("kt_kernel", self._peers)
        self.variant = os.environ.get("KT_KERNEL_CPU_VARIANT") or _kt_variant(_processor_flags())
        found = sorted(folder.glob(f"_kt_kernel_ext_{self.variant}.*.so"))
        if not found:
            raise Missing(f"kt_kernel has no variant {self.variant}")
        spec = importlib.util.spec_from_file_location("kt_kernel_ext", found[0])
        ext = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(ext)
        pool = ext.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
        self._cpu = ext.CPUInfer(pool)
        experts, hidden, intermediate = weights.down.shape
        self._mask = torch.zeros(experts, dtype=torch.bool)  # none of them on a GPU
        self._config = lambda top_k: ext.moe.MOEConfig(
            experts, top_k, hidden, intermediate, self._mask.data_ptr()
        )
        kind = "AVX2BF16_MOE" if self.variant == "avx2" else "AMXBF16_MOE"
        self._kind, self._weights, self._moe = getattr(ext.moe, kind), weights, None

    def _build(self, top_k: int) -> None:
        gate, up = self._weights.gate_up.chunk(2, dim=1)
        experts = range(gate.shape[0])
        config = self._config(top_k)
        config.layer_idx, config.pool, config.max_len = 0, self._cpu.backend_, 4096
        config.gate_projs = [[gate[e].data_ptr() for e in experts]]
        config.up_projs = [[up[e].data_ptr() for e in experts]]
        config.down_projs = [[self._weights.down[e].data_ptr() for e in experts]]
        config.gate_scales = config.up_scales = config.down_scales = [[0 for _ in experts]]
        self._moe = self._kind(config)
        same = torch.arange(len(experts))
        self._cpu.submit(self._moe.load_weights_task(same.data_ptr()))
        self._cpu.sync()
        self._weights = None  # it has its own copy now

    def forward(self, inputs: Inputs) -> Callable[[], Tensor]:
        tokens, top_k = inputs.topk_ids.shape
        if self._moe is None:
            self._build(top_k)
        ids, mix = inputs.topk_ids.contiguous(), inputs.topk_weights.contiguous()
        count = torch.tensor([tokens], dtype=torch.int32)

        def call() -> Tensor:
            out = torch.empty_like(inputs.x)
            addresses = [t.data_ptr() for t in (ids, mix, inputs.x, out)]
            self._cpu.submit(self._moe.forward_task(count.data_ptr(), top_k, *addresses, False))
            self._cpu.sync()
            return out

        return call


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def _kt_variant(flags: set[str]) -> str:
    """The variant that kt-kernel chooses by itself."""
    base = {"avx512f", "avx512bw"}
    vbmi = base | {"avx512_vnni", "avx512vbmi"}
    bf16 = vbmi | {"avx512_bf16"}
    for name, needs in (
        ("amx", bf16 | {"amx_tile", "amx_int8", "amx_bf16"}),
        ("avx512_bf16", bf16),
        ("avx512_vbmi", vbmi),
        ("avx512_vnni", base | {"avx512_vnni"}),
        ("avx512_base", base),
    ):
        if needs <= flags:
            return name
    return "avx2"


# The first is ours, the others are compared with it.
CONTENDERS: dict[str, Callable[[str | None], Contender]] = {
    "packed_experts": lambda peers: Packed(),
    "grouped_experts": lambda peers: Grouped(),
    "torch_grouped_mm": lambda peers: TorchGroupedMM(),
    "transformers_eager": lambda peers: Transformers("eager"),
    "transformers_grouped_mm": lambda peers: Transformers("grouped_mm"),
    "transformers_batched_mm": lambda peers: Transformers("batched_mm"),
    "vllm": VllmFused,
    "sglang": SglangFused,
    "kt_kernel": KtKernel,
}
OURS = ("packed_experts", "grouped_experts")


def find(name: str, peers: str | None) -> Contender:
    """Return a contender by its name; ``peers`` is a site-packages folder that has the peers."""
    return CONTENDERS[name](peers)

"""Packed copies of experts' weights for inference on the CPU: made once, dropped when stale."""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from mergeme_ext.ops import pack_experts, packed_experts, packed_matmul

__all__ = [
    "PackedExperts",
    "cached_experts",
    "cached_matmul",
    "can_cache",
    "lets_cache",
    "needs_grad",
    "packed_copies",
]

# What pack_experts lays out for its kernels.
PACKABLE = (torch.float32, torch.bfloat16, torch.float16)
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Copy:
    storage: StorageWeakRef
    state: tuple  # what _state said when the copy was made
    sample: Tensor
    layout: tuple  # dtype, gated, transposed
    packed: Tensor


class PackedExperts:
    """Packed copies of weights, each kept as long as its weight lives and has not changed.

    The copies hang on the weights, not on modules: a module's state dict, its pickle and its deep
    copy know nothing of them (a deep copy's weights are other tensors and get copies of their own),
    and deleting the model frees them.

    A copy is used again only if nothing says that its weight was written to since:

    - the weight is the same tensor object, over the same storage, which is still alive (its address
      alone could have been freed and given to another), at the same address, with the same shape;
    - its version counter has not moved: in-place ops, optimisers and ``load_state_dict`` move it.
      Tensors made under ``torch.inference_mode`` have none;
    - a sample of its elements, spread evenly over all experts, has the same bits. Writing through
      ``weight.data`` or another alias of the memory (NumPy, shared memory) moves no counter; a
      merged adapter, a scaled or reloaded weight changes so many elements that the sample shows it.
      Reading every element would cost as much as the matmul that packing speeds up, so a write past
      the counter to a few elements can stay unseen: call ``forget`` after such a write.

    One lock makes each copy once however many threads ask for it.
    """

    def __init__(self) -> None:
        self._copies = WeakTensorKeyDictionary()
        self._lock = threading.Lock()
        self.made = 0

    def __len__(self) -> int:
        return len(self._copies)

    def get(
        self,
        weight: Tensor,
        *,
        dtype: torch.dtype | None = None,
        gated: bool = False,
        transposed: bool = False,
    ) -> Tensor:
        """Return ``weight`` packed, from the cache if it is there and still right.

        Args:
            weight: Contiguous [E, N, K] on the CPU, or [E, K, N] if ``transposed``.
            dtype: What to pack it as; its own by default.
            gated: N is 2I, gate rows before up rows, to be laid out for ``packed_experts``.
            transposed: The layout of ``weight``.

        Returns:
            What ``pack_experts`` returns; not to be written to.
        """
        layout = (dtype or weight.dtype, gated, transposed)
        with self._lock:
            copy = self._copies.get(weight)
            if copy is None or copy.layout != layout or not _unchanged(weight, copy):
                # Gone before the new one is made: two at once would be a peak for nothing.
                self._copies.pop(weight, None)
                del copy
                self._copies[weight] = copy = _make(weight, layout)
                self.made += 1
            return copy.packed

    def forget(self, *weights: Tensor) -> None:
        """Drop the copies of ``weights``, of all weights if none is given."""
        with self._lock:
            if not weights:
                self._copies.clear()
            for weight in weights if len(self._copies) else ():
                self._copies.pop(weight, None)


packed_copies = PackedExperts()
"""The process's cache: one, so that modules and compiled graphs that share weights share copies."""


def _make(weight: Tensor, layout: tuple) -> _Copy:
    dtype, gated, transposed = layout
    # An inference tensor could not be used later where gradients are recorded.
    with torch.inference_mode(False), torch.no_grad():
        plain = weight.clone() if weight.is_inference() else weight.detach()
        return _Copy(
            storage=StorageWeakRef(weight.untyped_storage()),
            state=_state(weight),
            sample=_sample(plain).clone(),
            layout=layout,
            packed=pack_experts(plain.to(dtype), gated=gated, transposed=transposed),
        )


def _unchanged(weight: Tensor, copy: _Copy) -> bool:
    return (
        not copy.storage.expired()
        and copy.storage.cdata == weight.untyped_storage()._cdata
        and copy.state == _state(weight)
        and torch.equal(_sample(weight), copy.sample)
    )


def _state(weight: Tensor) -> tuple:
    version = None if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.dtype, weight.shape


def _sample(weight: Tensor) -> Tensor:
    """A view of some 256 elements, at least two of each expert, as integers: NaN equals itself.

    The step between them is odd, so that it walks through all columns of rows with an even length.
    """
    step = max(1, weight.numel() // max(256, 2 * weight.shape[0])) | 1
    count = -(-weight.numel() // step)
    # One view for speed: this runs in every call of every layer.
    view = weight.as_strided((count,), (step,), weight.storage_offset())
    return view.view(_BITS[weight.element_size()])


def can_cache(weight: Tensor) -> bool:
    """Return whether ``weight`` is worth a cached copy: a plain parameter, contiguous, on the CPU.

    What is no parameter is computed anew for each call (a parametrisation, an adapter, a gathered
    shard), and so would its copy be.
    """
    return (
        type(weight) is nn.Parameter
        and weight.device.type == "cpu"
        and weight.dtype in PACKABLE
        and weight.is_contiguous()
    )


def lets_cache(module: nn.Module, x: Tensor, topk_weights: Tensor, *weights: Tensor) -> bool:
    """Return whether a call of ``module`` may use cached copies of its ``weights``.

    Only in evaluation mode and without gradients: checkpointing runs the first forward of a
    training step without gradients too, and the weights will have changed by the next step.
    """
    return (
        all(can_cache(weight) for weight in weights)
        and x.dtype in PACKABLE
        and not module.training
        and not needs_grad(module, x, topk_weights)
    )


def needs_grad(module: nn.Module, *inputs: Tensor) -> bool:
    """Return whether a call of ``module`` with ``inputs`` will be differentiated."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *module.parameters()))


def cached_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    expert_offsets: Tensor,
    permutation: Tensor,
    inverse: Tensor,
    *,
    activation: str = "silu",
    transposed: bool = False,
) -> Tensor:
    """Return what ``grouped_experts`` does, computed with cached packed copies of the weights.

    Args:
        x: [T, H] on the CPU; float32, bfloat16 or float16, the dtype to compute in.
        gate_up: Parameter [E, 2I, H], gate rows first, or [E, H, 2I] if ``transposed``.
        down: Parameter [E, H, I], or [E, I, H] if ``transposed``.
        topk_weights: float32 [T, K].
        expert_offsets: From ``sort_by_expert``, as the next two.
        permutation: int32 [T * K].
        inverse: int32 [T * K].
        activation: "silu", "gelu" or "gelu_tanh".
        transposed: The layout of the weights.

    Returns:
        [T, H], new, dtype of ``x``. No gradient.
    """
    arguments = (x, gate_up, down, topk_weights, expert_offsets, permutation, inverse)
    run = _experts_op if torch.compiler.is_compiling() else _experts
    return run(*arguments, activation, transposed)


def cached_matmul(
    a: Tensor, weight: Tensor, expert_offsets: Tensor, *, transposed: bool = False
) -> Tensor:
    """Return what ``grouped_matmul_nt`` does (``_nn`` if ``transposed``), with a cached copy.

    Args:
        a: [S, K] on the CPU, rows sorted by expert; float32, bfloat16 or float16, the dtype to
            compute in.
        weight: Parameter [E, N, K], or [E, K, N] if ``transposed``.
        expert_offsets: int32 [E + 1].
        transposed: The layout of ``weight``.

    Returns:
        [S, N], new, dtype of ``a``. No gradient.
    """
    run = _matmul_op if torch.compiler.is_compiling() else _matmul
    return run(a, weight, expert_offsets, transposed)


def _experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    expert_offsets: Tensor,
    permutation: Tensor,
    inverse: Tensor,
    activation: str,
    transposed: bool,
) -> Tensor:
    layout = {"dtype": x.dtype, "transposed": transposed}
    return packed_experts(
        x,
        packed_copies.get(gate_up, gated=True, **layout),
        packed_copies.get(down, **layout),
        topk_weights,
        expert_offsets,
        permutation,
        inverse,
        intermediate=down.shape[1 if transposed else 2],
        activation=activation,
    )


def _matmul(a: Tensor, weight: Tensor, expert_offsets: Tensor, transposed: bool) -> Tensor:
    packed = packed_copies.get(weight, dtype=a.dtype, transposed=transposed)
    return packed_matmul(a, packed, expert_offsets, columns=weight.shape[2 if transposed else 1])


# A compiled graph calls these as one node each: it must look the copy up each time it runs, and
# must not take it for a temporary of its own whose memory it may use again.
_experts_op = torch.library.custom_op(
    "mergeme::cached_experts", _experts, mutates_args=(), device_types="cpu"
)
_matmul_op = torch.library.custom_op(
    "mergeme::cached_matmul", _matmul, mutates_args=(), device_types="cpu"
)


@_experts_op.register_fake
def _(x, *rest):
    return x.new_empty(x.shape)


@_matmul_op.register_fake
def _(a, weight, expert_offsets, transposed):
    return a.new_empty(a.shape[0], weight.shape[2 if transposed else 1])

"""Where the arithmetic of a merge happens; the data come from and go to the CPU's memory."""

import threading
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mergeme_ext.merging.registry import Combine

__all__ = ["Device", "open_device"]


class Device(Protocol):
    """A place to compute. Every thread of the merge calls it."""

    def whole(self, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        """Return whole tensors over there, for a look at them; None if they do not fit."""

    def combine(
        self, combine: Combine, base: Tensor | None, tensors: Sequence[Tensor], offset: int
    ) -> Tensor:
        """Return ``combine`` of flat chunks as a tensor on the CPU."""


class _Cpu:
    def whole(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)

    def combine(
        self, combine: Combine, base: Tensor | None, tensors: Sequence[Tensor], offset: int
    ) -> Tensor:
        return combine(base, tensors, offset)


class _Cuda:
    """Each thread has a stream and page-locked buffers of its own.

    So while one thread's chunk is computed, another's travels: two threads are double buffering.
    Nothing runs on the default stream.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._local = threading.local()

    def whole(self, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        free, _ = torch.cuda.mem_get_info(self.device)
        if 2 * sum(t.nbytes for t in tensors) > free:  # another thread may want as much
            return None
        with torch.cuda.stream(self._stream()):
            there = [torch.empty(t.shape, dtype=t.dtype, device=self.device) for t in tensors]
            for source, target in zip(tensors, there, strict=True):
                self._send(source.reshape(-1), target.view(-1))
        self._stream().synchronize()
        return there

    def combine(
        self, combine: Combine, base: Tensor | None, tensors: Sequence[Tensor], offset: int
    ) -> Tensor:
        every = [*tensors] if base is None else [base, *tensors]
        stream = self._stream()
        with torch.cuda.stream(stream):
            there = [t if t.is_cuda else self._to_device(i, t) for i, t in enumerate(every)]
            merged = combine(None if base is None else there.pop(0), there, offset)
            out = self._buffer("out", merged)
            out.copy_(merged, non_blocking=True)
        stream.synchronize()
        return out

    def _stream(self) -> torch.cuda.Stream:
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self.device)
            self._local.buffers = {}
        return self._local.stream

    def _buffer(self, key: object, like: Tensor) -> Tensor:
        """Return page-locked memory for ``like``, this thread's until it asks again."""
        buffers = self._local.buffers
        if key not in buffers or buffers[key].nbytes < like.nbytes:
            buffers[key] = torch.empty(like.nbytes, dtype=torch.uint8, pin_memory=True)
        return buffers[key][: like.nbytes].view(like.dtype).view(like.shape)

    def _to_device(self, key: object, chunk: Tensor) -> Tensor:
        pinned = self._buffer(key, chunk)
        pinned.copy_(chunk)
        return pinned.to(self.device, non_blocking=True)

    def _send(self, source: Tensor, target: Tensor, piece: int = 2**22) -> None:
        for number, start in enumerate(range(0, source.numel(), piece)):
            if number % 2 == 0:
                self._stream().synchronize()  # both buffers are free again
            part = source[start : start + piece]
            pinned = self._buffer(("send", number % 2), part)
            pinned.copy_(part)
            target[start : start + piece].copy_(pinned, non_blocking=True)


def open_device(name: str) -> Device:
    """Return the device called ``name``: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ValueError: It is none of these, or there is no such GPU, or the ops were built without
            CUDA.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"expected device to be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cpu":
        return _Cpu()
    if device.type != "cuda":
        raise ValueError(f"expected device to be cpu, cuda or cuda:N, got {name!r}")
    if not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: torch sees no GPU here")
    if (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r}: there are {torch.cuda.device_count()} GPUs")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("mergeme::weighted_sum", "CUDA"):
        raise ValueError(f"device {name!r}: mergeme_ext was built without CUDA")
    return _Cuda(device)

"""One safetensors file mapped into memory, and its tensors as views of the map."""

import functools
import math
import mmap
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from mergeme_ext.io.format import TensorInfo, read_header
from mergeme_ext.io.operands import Operand, Stored, check_rows

__all__ = ["MappedFile"]

_NO_EXTRA_DESCRIPTOR = {"trackfd": False} if sys.version_info >= (3, 13) else {}


class MappedFile:
    """A safetensors file, its header read at once; mapped read-only when first touched.

    The map lives as long as a tensor of it does.

    Raises:
        CheckpointError: The file breaks the format.
    """

    def __init__(self, path: Path):
        self._path = path
        self.infos, _ = read_header(path)

    @functools.cached_property
    def _map(self) -> mmap.mmap:
        with self._path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ, **_NO_EXTRA_DESCRIPTOR)

    @functools.cached_property
    def _bytes(self) -> Tensor:
        with warnings.catch_warnings():
            # The buffer is read-only on purpose; nobody writes into a source's tensor.
            warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
            return torch.frombuffer(self._map, dtype=torch.uint8)

    def operand(self, info: TensorInfo) -> Operand:
        """Return a tensor as an operand: stored, unless it lies at an odd address."""
        if not _aligned(info):
            return _Unaligned(self, info)
        return Stored(
            self.tensor(info),
            functools.partial(self.prefetch, info),
            functools.partial(self.release, info),
        )

    def tensor(self, info: TensorInfo) -> Tensor:
        """Return a tensor as a view of the map; a copy if it lies at an odd address."""
        return self.elements(info, 0, info.numel).view(info.shape)

    def elements(self, info: TensorInfo, begin: int, end: int) -> Tensor:
        """Return elements ``[begin, end)`` of a tensor, flat: a view, or a copy if unaligned."""
        if begin == end:
            return torch.empty(0, dtype=info.dtype)
        size = info.dtype.itemsize
        raw = self._bytes[info.start + begin * size : info.start + end * size]
        return (raw if _aligned(info) else raw.clone()).view(info.dtype)

    def prefetch(self, info: TensorInfo) -> None:
        """Ask the system to start reading a tensor."""
        if hasattr(mmap, "MADV_WILLNEED"):
            self._advise(info, mmap.MADV_WILLNEED)

    def release(self, info: TensorInfo) -> None:
        """Give a tensor's memory back to the system."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._advise(info, mmap.MADV_DONTNEED)

    def _advise(self, info: TensorInfo, advice: int) -> None:
        start = info.start // mmap.PAGESIZE * mmap.PAGESIZE
        if info.nbytes:
            self._map.madvise(advice, start, info.start + info.nbytes - start)


def _aligned(info: TensorInfo) -> bool:
    """Whether a view of the tensor's data is possible: its header may have an odd length."""
    return info.start % info.dtype.itemsize == 0 or info.numel == 0


class _Unaligned:
    """A tensor at an odd address of its file, copied by rows."""

    def __init__(self, file: MappedFile, info: TensorInfo):
        self.dtype = info.dtype
        self.shape = info.shape
        self._file = file
        self._info = info
        self.prefetch = functools.partial(file.prefetch, info)
        self.release = functools.partial(file.release, info)

    def stored(self) -> None:
        return None

    def rows(self, begin: int, end: int) -> Tensor:
        check_rows(self, begin, end)
        width = math.prod(self.shape[1:])
        flat = self._file.elements(self._info, begin * width, end * width)
        return flat.view(end - begin, *self.shape[1:])

"""One ``.bin`` file of ``torch.save``: mapped, and unpickled without running what is in it."""

import ctypes
import functools
import mmap
import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from mergeme_ext.io.format import DTYPES, CheckpointError, TensorInfo, dtype_name
from mergeme_ext.io.operands import Operand, Stored, check_rows

__all__ = ["PickledFile"]

# Older unpicklers can be tricked into running a program in spite of weights_only.
_SAFE_SINCE = (2, 6)


class PickledFile:
    """A file of ``torch.save`` that holds a dictionary of tensors, mapped copy-on-write.

    Tensors may share memory (tied weights) and be views of any strides.

    Raises:
        CheckpointError: The file is damaged, holds anything but tensors, or cannot be mapped.
    """

    def __init__(self, path: Path):
        _check_archive(path)
        self._tensors = _load(path)
        spans = [_span(t) for t in self._tensors.values() if t.numel()]
        first = min((start for start, _ in spans), default=0)
        # Dropping the pages of memory that is no map of the file would lose what is in them.
        last = max((end for _, end in spans), default=0)
        self._mapped = last - first <= path.stat().st_size
        infos = [
            TensorInfo(name, t.dtype, tuple(t.shape), path.name, max(0, t.data_ptr() - first))
            for name, t in self._tensors.items()
        ]
        self.infos = sorted(infos, key=lambda info: info.start)

    def operand(self, info: TensorInfo) -> Operand:
        """Return a tensor as an operand: stored, unless its elements lie in another order."""
        tensor = self._tensors[info.name]
        prefetch = functools.partial(self.prefetch, info)
        release = functools.partial(self.release, info)
        if tensor.is_contiguous():
            return Stored(tensor, prefetch, release)
        return _Strided(tensor, prefetch, release)

    def tensor(self, info: TensorInfo) -> Tensor:
        """Return a tensor as a view of the map; a copy if its elements lie in another order."""
        return self._tensors[info.name].contiguous()

    def prefetch(self, info: TensorInfo) -> None:
        """Ask the system to start reading a tensor."""
        _advise(self._tensors[info.name], "MADV_WILLNEED")

    def release(self, info: TensorInfo) -> None:
        """Give a tensor's memory back to the system."""
        if self._mapped:
            _advise(self._tensors[info.name], "MADV_DONTNEED")


def _check_archive(path: Path) -> None:
    """Refuse what ``torch.load`` would read whole, or would map without noticing compression."""
    try:
        if not zipfile.is_zipfile(path):
            raise CheckpointError(
                f"{path}: expected a file of torch.save since torch 1.6, got its older format, "
                "another file or a truncated one; the older format cannot be mapped: load it with "
                "torch.load(..., weights_only=True) and save it again"
            )
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            orders = [e for e in entries if e.filename.endswith("/byteorder") and e.file_size < 16]
            swapped = any(archive.read(entry) == b"big" for entry in orders)
    except CheckpointError:
        raise
    # The archive may be hostile: whatever the reader trips over, the file is to blame.
    except Exception as error:
        raise CheckpointError(f"{path}: damaged archive: {error}") from None
    if swapped:
        raise CheckpointError(f"{path}: its numbers are big-endian, so it cannot be mapped")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{path}: {entry.filename} is compressed, so it cannot be mapped")


def _load(path: Path) -> dict[str, Tensor]:
    if torch.torch_version.TorchVersion(torch.__version__) < _SAFE_SINCE:
        raise CheckpointError(
            f"{path}: reading .bin files safely takes torch 2.6 or newer, this is "
            f"{torch.__version__}"
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"{path}: holds more than weights, and reading that could run any program hidden in "
            f"it, so it was not read; ask the author for safetensors ({reason})"
        ) from None
    # The unpickler meets hostile input: whatever it trips over, the file is to blame.
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"{path}: damaged, torch.load cannot read it: {type(error).__name__}: {reason}"
        ) from None
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{path}: expected a dictionary of tensors, got {type(loaded).__name__}"
        )
    for name, tensor in loaded.items():
        _check_tensor(path, name, tensor)
    return {name: tensor.detach() for name, tensor in loaded.items()}


def _check_tensor(path: Path, name: object, tensor: object) -> None:
    if not isinstance(name, str):
        raise CheckpointError(f"{path}: expected tensor names as text, got {name!r:.60}")
    if not isinstance(tensor, Tensor):
        raise CheckpointError(
            f"{path}: expected {name!r} to be a tensor, got {type(tensor).__name__}; a checkpoint "
            "of a training run is not read, only a model's weights"
        )
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.device.type != "cpu" or tensor.dtype not in DTYPES.values():
        raise CheckpointError(
            f"{path}: tensor {name!r}: expected a plain tensor of a dtype that safetensors has, "
            f"got a {type(tensor).__name__} of {dtype_name(tensor.dtype)}, "
            f"{str(tensor.layout).removeprefix('torch.')}, on {tensor.device.type}"
        )
    storage = tensor.untyped_storage()
    if tensor.numel() and _span(tensor)[1] > storage.data_ptr() + storage.nbytes():
        raise CheckpointError(f"{path}: tensor {name!r} reaches beyond its data")


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the address of the first byte of a tensor and that behind the last one."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.dtype.itemsize


@functools.cache
def _madvise():
    try:
        return ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None


def _advise(tensor: Tensor, advice: str) -> None:
    """Advise the system about a tensor's pages; torch maps files without a handle on the map."""
    if not tensor.numel() or not hasattr(mmap, advice) or _madvise() is None:
        return
    start, end = _span(tensor)
    start = start // mmap.PAGESIZE * mmap.PAGESIZE
    _madvise()(ctypes.c_void_p(start), ctypes.c_size_t(end - start), getattr(mmap, advice))


class _Strided:
    """A tensor whose elements do not lie row by row, copied by rows."""

    def __init__(self, tensor: Tensor, prefetch, release):
        self.dtype = tensor.dtype
        self.shape = tuple(tensor.shape)
        self._tensor = tensor
        self.prefetch = prefetch
        self.release = release

    def stored(self) -> None:
        return None

    def rows(self, begin: int, end: int) -> Tensor:
        check_rows(self, begin, end)
        return self._tensor[begin:end].contiguous()

"""Reads checkpoints lazily: headers at once and strictly, tensors as views of the mapped files."""

import functools
import json
import math
import mmap
import stat
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergeme_ext.io.format import CheckpointError, TensorInfo, load_json_object, read_header
from mergeme_ext.io.operands import Operand, Stored, check_rows

__all__ = ["CheckpointSource"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")
_NO_EXTRA_DESCRIPTOR = {"trackfd": False} if sys.version_info >= (3, 13) else {}


def _plain_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not any(bad in name for bad in ("/", "\\", "\0", ":"))
        and not name.startswith(".")
    )


def _regular(path: Path) -> bool:
    """Whether ``path`` is a file, symbolic links followed; never opens it (it may be a pipe)."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def _read_index(path: Path) -> dict[str, str]:
    """Return the map from tensor to file in an index, with nothing in it that leaves the folder."""
    index = load_json_object(path.read_bytes(), str(path))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: expected an object weight_map that names each tensor's file"
        )
    for name, file in weight_map.items():
        if not _plain_name(file):
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected the name of a .safetensors file "
                f"in the same folder, got {file!r}"
            )
    for file in sorted(set(weight_map.values())):
        if not _regular(path.parent / file):
            raise CheckpointError(f"{path}: names {file}, which is not in the folder")
    return weight_map


class _MappedFile:
    """One file mapped read-only; the mapping lives as long as a tensor of it does."""

    def __init__(self, path: Path):
        with path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ, **_NO_EXTRA_DESCRIPTOR)
        with warnings.catch_warnings():
            # The buffer is read-only on purpose; nobody writes into a source's tensor.
            warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
            self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)

    def tensor(self, info: TensorInfo) -> Tensor:
        return self.elements(info, 0, info.numel).view(info.shape)

    def elements(self, info: TensorInfo, begin: int, end: int) -> Tensor:
        """Return elements ``[begin, end)`` of a tensor, flat: a view, or a copy if unaligned."""
        if begin == end:
            return torch.empty(0, dtype=info.dtype)
        size = info.dtype.itemsize
        raw = self.bytes[info.start + begin * size : info.start + end * size]
        return (raw if self.aligned(info) else raw.clone()).view(info.dtype)

    def aligned(self, info: TensorInfo) -> bool:
        """Whether a view of the tensor's data is possible: its header may have an odd length."""
        return info.start % info.dtype.itemsize == 0 or info.numel == 0

    def prefetch(self, info: TensorInfo) -> None:
        if hasattr(mmap, "MADV_WILLNEED"):
            self._advise(info, mmap.MADV_WILLNEED)

    def release(self, info: TensorInfo) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            self._advise(info, mmap.MADV_DONTNEED)

    def _advise(self, info: TensorInfo, advice: int) -> None:
        start = info.start // mmap.PAGESIZE * mmap.PAGESIZE
        if info.nbytes:
            self.map.madvise(advice, start, info.start + info.nbytes - start)


class _Unaligned:
    """A tensor at an odd address of its file, copied by rows."""

    def __init__(self, file: _MappedFile, info: TensorInfo):
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


class CheckpointSource:
    """A checkpoint folder opened for reading; every header has been checked when this returns.

    Args:
        path: Folder with ``model.safetensors``, or with ``model.safetensors.index.json`` and its
            shards. If it holds both, the single file is read, as transformers does. Files may be
            symbolic links (Hugging Face's cache is made of them); names in an index never leave
            the folder.

    Raises:
        CheckpointError: The folder holds no safetensors checkpoint, or a damaged one.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: expected a model's folder, found none")
        self._config: dict[str, Any] | None = None
        self._maps: dict[str, _MappedFile] = {}
        self._infos: dict[str, TensorInfo] = {}
        if _regular(self.path / SINGLE):
            self._add_file(SINGLE)
        elif _regular(self.path / INDEX):
            self._add_shards(_read_index(self.path / INDEX))
        else:
            self._refuse_folder()

    def _refuse_folder(self) -> None:
        if any((self.path / name).exists() for name in PICKLED):
            raise CheckpointError(
                f"{self.path}: holds only a pickled checkpoint, and unpickling a file can run any "
                "program hidden in it; ask the author for safetensors, or convert it yourself with "
                "from_pretrained and save_pretrained of transformers if you trust it"
            )
        others = sorted(p.name for p in self.path.glob("*.safetensors"))
        found = f"; it does hold {', '.join(others[:4])}" if others else ""
        raise CheckpointError(f"{self.path}: expected {SINGLE} or {INDEX} in the folder{found}")

    def _add_file(self, file: str) -> None:
        for info in read_header(self.path / file)[0]:
            if (other := self._infos.get(info.name)) is not None:
                raise CheckpointError(
                    f"{self.path}: tensor {info.name!r} is in two shards, {other.file} and {file}"
                )
            self._infos[info.name] = info

    def _add_shards(self, weight_map: Mapping[str, str]) -> None:
        for file in sorted(set(weight_map.values())):
            self._add_file(file)
        for name, file in weight_map.items():
            if (info := self._infos.get(name)) is None or info.file != file:
                raise CheckpointError(
                    f"{self.path}: {INDEX} puts tensor {name!r} in {file}, which does not hold it"
                )
        for name, info in self._infos.items():
            if name not in weight_map:
                raise CheckpointError(
                    f"{self.path}: {info.file} holds tensor {name!r}, which {INDEX} does not list"
                )

    @property
    def names(self) -> list[str]:
        """All tensor names, in the order in which their data lie on disk."""
        return list(self._infos)

    @property
    def config(self) -> dict[str, Any]:
        """A copy of ``config.json``; empty if the folder has none."""
        if self._config is None:
            path = self.path / "config.json"
            text = path.read_bytes() if _regular(path) else b"{}"
            self._config = load_json_object(text, str(path))
        return json.loads(json.dumps(self._config))

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __len__(self) -> int:
        return len(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Return what the header says of tensor ``name``.

        Raises:
            CheckpointError: There is no such tensor.
        """
        try:
            return self._infos[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: has no tensor {name!r}") from None

    def tensor(self, name: str) -> Tensor:
        """Return tensor ``name`` as a read-only view of the mapped file.

        Nothing is read until elements are touched. Do not write into it: the pages are read-only
        and the process would die. Data at an odd address (legal, rare) come as a copy.

        Raises:
            CheckpointError: There is no such tensor.
        """
        info = self.info(name)
        return self._file(info).tensor(info)

    def operand(self, name: str) -> Operand:
        """Return tensor ``name`` as an operand: stored, unless it lies at an odd address.

        Raises:
            CheckpointError: There is no such tensor.
        """
        info = self.info(name)
        if not self._file(info).aligned(info):
            return _Unaligned(self._file(info), info)
        return Stored(
            self.tensor(name),
            functools.partial(self.prefetch, name),
            functools.partial(self.release, name),
        )

    def prefetch(self, name: str) -> None:
        """Ask the system to start reading tensor ``name``; returns at once."""
        self._file(self.info(name)).prefetch(self.info(name))

    def release(self, name: str) -> None:
        """Give tensor ``name``'s memory back to the system; touching it again reads it again."""
        self._file(self.info(name)).release(self.info(name))

    def _file(self, info: TensorInfo) -> _MappedFile:
        if info.file not in self._maps:
            self._maps[info.file] = _MappedFile(self.path / info.file)
        return self._maps[info.file]

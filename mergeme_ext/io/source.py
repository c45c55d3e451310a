"""Reads checkpoints lazily: headers at once and strictly, tensors as views of the mapped files."""

import dataclasses
import json
import stat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergeme_ext.io.format import DTYPES, CheckpointError, TensorInfo, dtype_name, load_json_object
from mergeme_ext.io.mapped import MappedFile
from mergeme_ext.io.operands import Operand
from mergeme_ext.io.pickled import PickledFile
from mergeme_ext.io.quantised import FP8, Dequantised, find_scales, without_quantisation

__all__ = ["CheckpointSource"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pth", ".pt", ".gguf")


def _plain_name(name: object, suffix: str) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(suffix)
        and not any(bad in name for bad in ("/", "\\", "\0", ":"))
        and not name.startswith(".")
    )


def _regular(path: Path) -> bool:
    """Whether ``path`` is a file, symbolic links followed; never opens it (it may be a pipe)."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return False


def _read_index(path: Path) -> dict[str, str]:
    """Return the map from tensor to file in an index, with nothing in it that leaves the folder."""
    suffix = ".bin" if path.name.endswith(".bin.index.json") else ".safetensors"
    index = load_json_object(path.read_bytes(), str(path))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: expected an object weight_map that names each tensor's file"
        )
    for name, file in weight_map.items():
        if not _plain_name(file, suffix):
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected the name of a {suffix} file "
                f"in the same folder, got {file!r}"
            )
    for file in sorted(set(weight_map.values())):
        if not _regular(path.parent / file):
            raise CheckpointError(f"{path}: names {file}, which is not in the folder")
    return weight_map


class CheckpointSource:
    """A checkpoint folder opened for reading; every header has been checked when this returns.

    FP8 weights are numbers in float32 to the outside: their scales are applied when rows are read,
    and no longer appear as tensors, nor ``quantization_config`` in the config.

    Args:
        path: Folder with ``model.safetensors``, or with an index (``*.safetensors.index.json``) and
            its shards, or the same as ``pytorch_model.bin``. If it holds several, the first of
            these is read, as transformers does. Files may be symbolic links (Hugging Face's cache
            is made of them); names in an index never leave the folder.

    Raises:
        CheckpointError: The folder holds no checkpoint, a damaged one, or one in a
            quantised format other than FP8.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: expected a model's folder, found none")
        self._config = self._read_config()
        self._files: dict[str, MappedFile | PickledFile] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._add_files()
        self._dequantise()

    def _read_config(self) -> dict[str, Any]:
        path = self.path / "config.json"
        return load_json_object(path.read_bytes() if _regular(path) else b"{}", str(path))

    def _add_files(self) -> None:
        others = sorted(p.name for p in self.path.glob("*.safetensors.index.json"))
        if _regular(self.path / SINGLE):
            self._add_file(SINGLE)
        elif _regular(self.path / INDEX):
            self._add_shards(INDEX)
        elif len(others) == 1 and _regular(self.path / others[0]):
            self._add_shards(others[0])
        elif _regular(self.path / PICKLED):
            self._add_file(PICKLED)
        elif _regular(self.path / PICKLED_INDEX):
            self._add_shards(PICKLED_INDEX)
        else:
            self._refuse_folder()

    def _refuse_folder(self) -> None:
        found = sorted(p.name for p in self.path.iterdir() if p.name.endswith(_WEIGHTS))
        hint = f"; it does hold {', '.join(found[:4])}" if found else ""
        if any(name.endswith(".gguf") for name in found):
            hint += " (GGUF weights are quantised and renamed: merge the model they were made from)"
        raise CheckpointError(
            f"{self.path}: expected {SINGLE}, {INDEX} or {PICKLED} in the folder{hint}"
        )

    def _add_file(self, file: str) -> None:
        kind = PickledFile if file.endswith(".bin") else MappedFile
        self._files[file] = kind(self.path / file)
        for info in self._files[file].infos:
            if (other := self._infos.get(info.name)) is not None:
                raise CheckpointError(
                    f"{self.path}: tensor {info.name!r} is in two shards, {other.file} and {file}"
                )
            self._infos[info.name] = info

    def _add_shards(self, index: str) -> None:
        weight_map = _read_index(self.path / index)
        for file in sorted(set(weight_map.values())):
            self._add_file(file)
        for name, file in weight_map.items():
            if (info := self._infos.get(name)) is None or info.file != file:
                raise CheckpointError(
                    f"{self.path}: {index} puts tensor {name!r} in {file}, which does not hold it"
                )
        for name, info in self._infos.items():
            if name not in weight_map:
                raise CheckpointError(
                    f"{self.path}: {info.file} holds tensor {name!r}, which {index} does not list"
                )

    def _dequantise(self) -> None:
        """Make FP8 weights what they stand for; from here on nothing is quantised."""
        self._on_disk = dict(self._infos)
        self._scalings, self._dropped = find_scales(
            self._on_disk,
            self._config,
            str(self.path),
            lambda name: self._file(name).tensor(self._on_disk[name]),
        )
        self._config = without_quantisation(self._config)
        for name in self._dropped:
            del self._infos[name]
        for name in self._scalings:
            self._infos[name] = dataclasses.replace(self._infos[name], dtype=torch.float32)

    @property
    def label(self) -> str:
        """What messages call the model."""
        return str(self.path)

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer that the embedding's rows belong to lies, if there is one."""
        return self.path

    @property
    def names(self) -> list[str]:
        """All tensor names, in the order in which their data lie on disk."""
        return list(self._infos)

    @property
    def dropped(self) -> dict[str, str]:
        """Tensors on disk that are not among ``names``, and why: scales of FP8 weights."""
        return dict(self._dropped)

    @property
    def config(self) -> dict[str, Any]:
        """A copy of ``config.json``, for the model as ``operand`` gives it; {} if there is none."""
        return json.loads(json.dumps(self._config))

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __len__(self) -> int:
        return len(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Return name, dtype and shape of tensor ``name`` as ``operand`` gives it, and its place.

        Raises:
            CheckpointError: There is no such tensor.
        """
        try:
            return self._infos[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: has no tensor {name!r}") from None

    def default_dtype(self, name: str) -> torch.dtype:
        """Return the dtype that tensor ``name`` should have in a result that keeps dtypes.

        It is the tensor's own; for FP8 weights the dtype that the config names, else bfloat16.
        """
        dtype = self.info(name).dtype
        if name not in self._scalings:
            return dtype
        named = str(self._config.get("dtype") or self._config.get("torch_dtype"))
        known = {dtype_name(d): d for d in DTYPES.values() if d.is_floating_point and d not in FP8}
        return known.get(named.removeprefix("torch."), torch.bfloat16)

    def bytes_to_read(self, name: str) -> int:
        """Return how many bytes of the files tensor ``name`` is computed from."""
        self.info(name)
        scale = self._scalings[name].scale if name in self._scalings else None
        return sum(self._on_disk[part].nbytes for part in (name, scale) if part is not None)

    def tensor(self, name: str) -> Tensor:
        """Return tensor ``name`` as a read-only view of the mapped file.

        Nothing is read until elements are touched. Do not write into it: the pages are read-only
        and the process would die. Data at an odd address, or in another order than row by row
        (legal, rare), come as a copy.

        Raises:
            CheckpointError: There is no such tensor, or it is FP8: ``operand`` gives its values.
        """
        info = self.info(name)
        if name in self._scalings:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is {dtype_name(self._on_disk[name].dtype)} on disk, "
                "which only a merge reads; save the model in bfloat16 first"
            )
        return self._file(name).tensor(info)

    def operand(self, name: str) -> Operand:
        """Return tensor ``name`` as an operand: stored if its values lie on disk as they are.

        Raises:
            CheckpointError: There is no such tensor.
        """
        self.info(name)
        on_disk = self._file(name).operand(self._on_disk[name])
        if name not in self._scalings:
            return on_disk
        scaling = self._scalings[name]
        if scaling.scale is None:
            return Dequantised(on_disk, None, scaling)
        scale = self._file(scaling.scale).operand(self._on_disk[scaling.scale])
        return Dequantised(on_disk, scale, scaling)

    def prefetch(self, name: str) -> None:
        """Ask the system to start reading tensor ``name``; returns at once."""
        self.operand(name).prefetch()

    def release(self, name: str) -> None:
        """Give tensor ``name``'s memory back to the system; touching it again reads it again."""
        self.operand(name).release()

    def _file(self, name: str) -> MappedFile | PickledFile:
        return self._files[self._on_disk[name].file]

"""The safetensors format: dtype names, headers read strictly and headers written.

A file is an 8-byte little-endian length, a JSON header of that length, then the data of all
tensors, row-major, with neither overlap nor hole.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "DTYPES",
    "CheckpointError",
    "TensorInfo",
    "dtype_name",
    "encode_header",
    "format_size",
    "load_json_object",
    "parse_size",
    "read_header",
]

# The reference implementation refuses longer headers too.
MAX_HEADER_BYTES = 100_000_000
# More dimensions, or sizes that overflow 64 bits, no library can hold; multiplying a header's worth
# of such sizes out would take hours.
_MAX_DIMENSIONS = 64
_MAX_ELEMENTS = 2**63

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint that is damaged, unsafe to read, or does not fit the others."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint; ``file`` and ``start`` (a byte offset) say where it lies."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str = ""
    start: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.numel * self.dtype.itemsize


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``dtype`` as Python users write it, ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def parse_size(size: int | str) -> int:
    """Return ``size`` in bytes; ``5GB`` and ``500MB`` are decimal, as on the Hub, ``1GiB`` is not.

    Raises:
        ValueError: The text is not a positive number with such a unit.
    """
    binary = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    units = binary | {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1}
    text = str(size).strip().upper()
    unit = next((u for u in units if text.endswith(u)), "")
    try:
        value = float(text.removesuffix(unit)) * units.get(unit, 1)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 1):
        raise ValueError(f"expected a size such as 5GB or 500MB, got {size!r}")
    return int(value)


def format_size(nbytes: int) -> str:
    """Return ``nbytes`` for people: ``269 MB``, ``5.2 GB``; decimal like ``parse_size``."""
    value, unit = float(nbytes), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise CheckpointError(f"key {twice!r} appears twice")
    return out


def _refuse_constant(text: str) -> None:
    raise CheckpointError(f"{text} is not JSON")


def load_json_object(text: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object in ``text``, strictly: UTF-8, no duplicate keys, no NaN.

    Raises:
        CheckpointError: It is anything else; ``what`` opens the message.
    """
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_refuse_duplicates,
            parse_constant=_refuse_constant,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what}: expected JSON, got something else ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what}: expected a JSON object, got {type(value).__name__}")
    return value


def _natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _read_entry(path: Path, name: str, entry: object) -> tuple[torch.dtype, tuple, int, int]:
    what = f"{path}: tensor {name!r}"
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise CheckpointError(f"{what}: expected a name that is text, got half a character in it")
    if not isinstance(entry, dict):
        raise CheckpointError(f"{what}: expected an object in the header, got {entry!r:.60}")
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{what}: expected the fields dtype, shape and data_offsets, got {sorted(entry)}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and dtype in DTYPES):
        raise CheckpointError(f"{what}: unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    if not (isinstance(shape, list) and all(map(_natural, shape))):
        raise CheckpointError(f"{what}: expected shape as a list of sizes, got {shape!r:.60}")
    if len(shape) > _MAX_DIMENSIONS or math.prod(max(1, n) for n in shape) >= _MAX_ELEMENTS:
        raise CheckpointError(f"{what}: expected fewer or smaller dimensions, got {shape!r:.60}")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_natural, offsets))):
        raise CheckpointError(f"{what}: expected data_offsets [begin, end], got {offsets!r:.60}")
    begin, end = offsets
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise CheckpointError(
            f"{what}: shape {shape} of {dtype} takes {nbytes} bytes, "
            f"but data_offsets [{begin}, {end}] hold {end - begin}"
        )
    return DTYPES[dtype], tuple(shape), begin, end


def read_header(path: Path) -> tuple[list[TensorInfo], dict[str, str]]:
    """Return the tensors of one safetensors file in data order, and its metadata.

    Raises:
        CheckpointError: The file breaks the format in any way; the message says how.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{path}: truncated: {size} bytes is too short for a header")
        (length,) = struct.unpack("<Q", prefix)
        if length > size - 8:
            raise CheckpointError(
                f"{path}: the header should take {length} bytes, but only {size - 8} follow: "
                "truncated, or not a safetensors file"
            )
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path}: expected a header of at most {MAX_HEADER_BYTES} bytes, got {length}"
            )
        header = load_json_object(file.read(length), f"{path}: header")
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise CheckpointError(f"{path}: expected __metadata__ to map text to text")

    entries = [(name, *_read_entry(path, name, entry)) for name, entry in header.items()]
    entries.sort(key=lambda e: (e[3], e[4]))
    position, previous = 0, "the header"
    for name, _, _, begin, end in entries:
        if begin < position:
            raise CheckpointError(
                f"{path}: {previous} and tensor {name!r} overlap: "
                f"one ends at byte {position}, the other begins at {begin}"
            )
        if begin > position:
            raise CheckpointError(
                f"{path}: {begin - position} bytes between {previous} and tensor {name!r} "
                "belong to no tensor"
            )
        position, previous = end, f"tensor {name!r}"
    data = size - 8 - length
    if position > data:
        raise CheckpointError(
            f"{path}: truncated: the header describes {position} bytes of data, the file has {data}"
        )
    if position < data:
        raise CheckpointError(f"{path}: {data - position} bytes at the end belong to no tensor")
    infos = [
        TensorInfo(name, dtype, shape, path.name, 8 + length + begin)
        for name, dtype, shape, begin, _ in entries
    ]
    return infos, metadata


def encode_header(tensors: Iterable[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Return length and header for ``tensors`` laid out in this order; data start at 8k bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for tensor in tensors:
        end = position + tensor.nbytes
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text

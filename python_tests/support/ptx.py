"""The PTX interpreter for numpy arrays: one kernel, its arguments, its launch, its statistics.

m = Module(text)                          # what nvcc -ptx wrote
a = m.alloc(array, "a", readonly=True)    # a guarded copy; pass it as a pointer
st = m.launch("kernel", grid=(4,), block=(256,), args=[a, np.int32(n)])
"""

import json
import struct
from pathlib import Path

import numpy as np

from mergeme_ext import _simt

VMError = RuntimeError


def pointer(a: np.ndarray) -> int:
    return a.__array_interface__["data"][0]


def bf16(x) -> np.ndarray:
    """Bits of bfloat16, rounded to nearest even."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def from_bf16(h) -> np.ndarray:
    return (np.asarray(h, dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)


def _three(x) -> list[int]:
    x = [x] if np.isscalar(x) else list(x)
    return [int(v) for v in x] + [1] * (3 - len(x))


class Module:
    def __init__(self, source):
        text = source if isinstance(source, str) and "\n" in source else Path(source).read_text()
        self._module = _simt.ptx.Module(text)
        self._buffers: dict[int, tuple] = {}

    def kernels(self):
        return self._module.kernels()

    def find(self, name: str):
        """The kernel of that name, mangled or not; or the only one whose name contains it."""
        kernels = self.kernels()
        hits = [k for k in kernels if name in (k.name, k.readable)]
        hits = hits or [k for k in kernels if name in k.name or name in k.readable]
        if len(hits) > 1:
            plain = [k for k in hits if k.readable.split("(")[0].split("<")[0].split()[-1] == name]
            hits = plain or hits
        if len(hits) != 1:
            raise VMError(f"{name!r} names {len(hits)} of {[k.readable for k in kernels]}")
        return hits[0]

    def register(self, a: np.ndarray, name="buffer", readonly=False, keep=None) -> np.ndarray:
        """Lets kernels reach the array's memory."""
        assert a.flags["C_CONTIGUOUS"]
        buffer = _simt.ptx.Buffer(pointer(a), max(a.nbytes, 1), readonly, name)
        self._buffers[pointer(a)] = (buffer, a, keep)
        return a

    def unregister(self, *arrays: np.ndarray):
        for a in arrays:
            self._buffers.pop(pointer(a), None)

    def alloc(self, a, name="buffer", readonly=False, guard=4096) -> np.ndarray:
        """A copy that kernels may reach, aligned to 256 bytes, between guards that they may not."""
        a = np.ascontiguousarray(a)
        raw = np.full(a.nbytes + 2 * guard + 256, 0xA5, np.uint8)
        offset = guard + (-(pointer(raw) + guard)) % 256
        view = raw[offset : offset + a.nbytes].view(a.dtype).reshape(a.shape)
        view[...] = a
        return self.register(view, name, readonly, keep=raw)

    def variable(self, name: str, dtype=np.uint8) -> np.ndarray:
        """A .global or .const variable of the module."""
        import ctypes

        address, size = self._module.variable(name)
        if not address:
            raise VMError(f"no variable {name}")
        return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=dtype)

    def pack(self, kernel: str, args) -> bytes:
        """Arguments as the kernel declares them: arrays are pointers, scalars and bytes copied."""
        k = self.find(kernel)
        if len(args) != len(k.parameters):
            raise VMError(f"{k.readable} takes {len(k.parameters)} arguments, got {len(args)}")
        packed = bytearray(k.parameter_bytes)
        for value, p in zip(args, k.parameters, strict=True):
            if isinstance(value, np.ndarray):
                data = struct.pack("<Q", pointer(value))
            elif isinstance(value, (bytes, bytearray)):
                data = bytes(value)
            elif isinstance(value, np.generic):
                data = value.tobytes()
            elif isinstance(value, float):
                data = struct.pack("<f" if p.size == 4 else "<d", value)
            elif value is None:
                data = bytes(p.size)
            else:
                data = int(value).to_bytes(p.size, "little", signed=int(value) < 0)
            if len(data) != p.size:
                raise VMError(
                    f"{k.readable}: expected an argument of {p.size} bytes, got {len(data)}"
                )
            packed[p.offset : p.offset + p.size] = data
        return bytes(packed)

    def launch(
        self,
        kernel,
        grid,
        block,
        smem=0,
        params=None,
        args=None,
        cluster=1,
        order="linear",
        stats=True,
        race=False,
        race_error=False,
        timeout=600.0,
        **options,
    ):
        """Runs one kernel; returns its statistics. See csrc/ptx/interpreter.h for the options."""
        k = self.find(kernel)
        o = _simt.ptx.LaunchOptions()
        o.grid, o.block, o.cluster = _three(grid), _three(block), _three(cluster)
        o.shared_bytes, o.statistics, o.races, o.stop_at_race = smem, stats, race, race_error
        o.order = getattr(_simt.ptx.BlockOrder, order.upper())
        o.max_seconds = timeout
        for name, value in options.items():
            setattr(o, name, value)
        parameters = bytes(params) if params is not None else self.pack(k.name, args or [])
        buffers = [entry[0] for entry in self._buffers.values()]
        return statistics(self._module.launch(k.name, o, parameters, buffers))


def statistics(text: str) -> dict:
    """The interpreter's counts, and their ratios to the ideal."""
    st = json.loads(text)
    for key in ("global_load", "global_store"):
        if key in st:
            st[key]["efficiency"] = st[key]["ideal_sectors"] / max(st[key]["sectors"], 1) or 1.0
    if "shared" in st:
        ideal = st["shared"]["ideal_wavefronts"]
        st["shared"]["conflict_degree"] = st["shared"]["wavefronts"] / ideal if ideal else 1.0
    return st


_FORMATS = {"u8": (0, 1), "u16": (1, 2), "u32": (2, 4), "s32": (3, 4), "u64": (4, 8), "s64": (5, 8)}
_FORMATS |= {"f16": (6, 2), "f32": (7, 4), "f64": (8, 8), "bf16": (9, 2), "tf32": (11, 4)}


def tensor_map(
    array, dims, strides, box, fmt="bf16", swizzle=0, fill=0, elem_strides=None
) -> bytes:
    """A tensor map of 128 bytes as the interpreter reads it (real ones are opaque).

    dims and box run from the innermost dimension out; strides are bytes of dimensions 1 and on;
    swizzle is 0, 32, 64 or 128.
    """
    base = pointer(array) if isinstance(array, np.ndarray) else int(array)
    number, size = _FORMATS[fmt]
    n = len(dims)
    steps = list(elem_strides or [1] * n)
    b = struct.pack("<QQII", 0x50414D54584D5650, base, n, number)
    b += struct.pack("<5Q", *(list(dims) + [1] * (5 - n)))
    b += struct.pack("<4Q", *(list(strides) + [0] * (4 - len(strides))))
    b += struct.pack("<5H", *(list(box) + [1] * (5 - n))) + struct.pack(
        "<5B", *(steps + [1] * (5 - n))
    )
    b += struct.pack("<4B", {0: 0, 32: 1, 64: 2, 128: 3}[swizzle], fill, size, 0)
    return b + bytes(128 - len(b))

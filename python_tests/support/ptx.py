"""The PTX interpreter for numpy arrays: one kernel, its arguments, its launch, its statistics.

m = Module(text)                          # what nvcc -ptx wrote
a = m.alloc(array, "a", readonly=True)    # a guarded copy; pass it as a pointer
st = m.launch("kernel", grid=(4,), block=(256,), args=[a, np.int32(n)])

And for whole ops, which run in it as torch.ops.mergeme_ptx80 and mergeme_ptx90 (csrc/ptx/ops.cpp):

with recording() as launches:             # one Launch for each, with its statistics
    torch.ops.mergeme_ptx80.weighted_sum(tensors, weights)
with override("gram", "sm_80", text):     # another PTX for an op's kernels
    torch.ops.mergeme_ptx80.gram(...)
"""

import contextlib
import dataclasses
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


ARCHITECTURES = {"ptx80": "sm_80", "ptx90": "sm_90a"}  # of the backends


@dataclasses.dataclass
class Launch:
    """One launch of an op: ``variant`` is the launcher's name for it, ``kernel`` is demangled."""

    op: str
    variant: str
    kernel: str
    architecture: str
    capability: int
    seed: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: int
    shared_bytes: int
    statistics: dict


@contextlib.contextmanager
def _set(**values):
    old = {name: getattr(_simt.ptx.settings, name) for name in values}
    try:
        for name, value in values.items():
            setattr(_simt.ptx.settings, name, value)
        yield
    finally:
        for name, value in old.items():
            setattr(_simt.ptx.settings, name, value)


@contextlib.contextmanager
def recording(seeds=(0,), profile=False):
    """Collects the launches of all ops that run on ptx80 or ptx90, in order.

    The list fills when the context ends. An op launches once for every seed, here only for the
    first unless told otherwise; with ``profile`` the statistics count every line of the PTX.
    """
    launches: list[Launch] = []
    _simt.ptx.take_records()
    with _set(seeds=list(seeds), record=True, profile=profile):
        try:
            yield launches
        finally:
            names = [f.name for f in dataclasses.fields(Launch)]
            for record in _simt.ptx.take_records():
                values = {name: getattr(record, name) for name in names}
                values |= {"grid": tuple(record.grid), "block": tuple(record.block)}
                launches.append(Launch(**values | {"statistics": statistics(record.statistics)}))


@contextlib.contextmanager
def override(op: str, architecture: str, text: str):
    """Runs ``text`` instead of the PTX of ``csrc/ops/<op>`` for "sm_80" or "sm_90a"."""
    _simt.ptx.override_text(op, architecture, text)
    try:
        yield
    finally:
        _simt.ptx.override_text(op, architecture, "")


def seeds(*numbers: int):
    """Runs every op once for each of these seeds instead of 0, 1 and 2."""
    return _set(seeds=list(numbers))


def pretending(capability: int):
    """Lets both backends pass for a device of this capability, each with its own text."""
    return _set(capability=capability)


def small_grids(blocks: int):
    """Launches at most so many blocks along each axis: only for kernels that stride."""
    return _set(max_grid=blocks)


def time_limit(seconds: float):
    """Stops a launch that takes longer."""
    return _set(max_seconds=seconds)


def built_ops(architecture: str) -> list[str]:
    """The folders of csrc/ops whose PTX was built for "sm_80" or "sm_90a"."""
    return _simt.ptx.built_ops(architecture)


def text_of(op: str, architecture: str) -> str:
    """What nvcc made of the op's launch.cu."""
    return _simt.ptx.text_of(op, architecture)


def kernel_names(text: str) -> list[str]:
    """Mangled, in the order of the text."""
    return _simt.ptx.kernel_names(text)


def only_kernel(text: str, kernel: str) -> str:
    """The text without its other kernels; lines keep their numbers."""
    return _simt.ptx.only_kernel(text, kernel)


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

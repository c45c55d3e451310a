"""The machine's own limits, measured: multiply-adds and bytes read a second, per thread count."""

import ctypes
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

__all__ = ["NOISE", "Limits", "Probe", "noise_of", "peak_flops"]

SOURCE = Path(__file__).with_name("roofline.c")
# Probes further apart than this, and something else was running.
NOISE = 1.15
FLOP_SECONDS = 0.02
STREAMS = (1, 2, 4, 8)

Limits = dict[str, float]


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled probes; None without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "roofline.so"
        flags = ["-O2", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        done = subprocess.run([compiler, *flags, SOURCE, "-o", built], capture_output=True)
        if done.returncode:
            return None
        library = ctypes.CDLL(str(built))
    for name in ("fma_rate", "bf16_dot_rate", "bf16_tile_rate"):
        getattr(library, name).restype = ctypes.c_double
        getattr(library, name).argtypes = [ctypes.c_double]
    library.read_rate.restype = ctypes.c_double
    library.read_rate.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


class Probe:
    """Measures the limits over one buffer, which should be larger than the last cache.

    Args:
        buffer: Any contiguous tensor; it is read, never written.
    """

    def __init__(self, buffer: torch.Tensor) -> None:
        self._buffer = buffer
        self._forms: dict[str, bool] = {}

    def flush(self) -> None:
        """Read the buffer through, so that nothing else is left in the caches."""
        self._read_rate(1, 1)

    def limits(self, threads: int) -> Limits:
        """Return ``read_gb_per_s``, and the multiply-add rates in GF/s by form of instruction."""
        rates = [self._read_rate(threads, streams) for streams in STREAMS for _ in range(2)]
        found = {"read_gb_per_s": max(rates) / 1e9}
        library = _library()
        if library is None:
            found["matmul_gflop_per_s"] = _matmul_rate(threads) / 1e9
            return found
        for name in ("fma_rate", "bf16_dot_rate", "bf16_tile_rate"):
            if not self._forms.get(name, True):
                continue
            function = getattr(library, name)
            rates = _on(threads, [lambda f=function: f(FLOP_SECONDS)] * threads)
            self._forms[name] = min(rates) > 0
            if self._forms[name]:
                found[f"{name.removesuffix('_rate')}_gflop_per_s"] = sum(rates) / 1e9
        return found

    def _read_rate(self, threads: int, streams: int) -> float:
        library = _library()
        if library is None:
            flat = self._buffer.view(torch.int64)
            started = time.perf_counter()
            flat.sum()
            return self._buffer.nbytes / (time.perf_counter() - started)
        start = -(-self._buffer.data_ptr() // 64) * 64
        share = (self._buffer.nbytes - 64) // threads // 512 * 512
        jobs = [
            lambda i=i: library.read_rate(start + i * share, share, streams) for i in range(threads)
        ]
        return sum(_on(threads, jobs))


def _on(threads: int, jobs: list) -> list[float]:
    """Run ``jobs`` at the same time; foreign functions run without the interpreter's lock."""
    if threads == 1:
        return [jobs[0]()]
    with ThreadPoolExecutor(threads) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def _matmul_rate(threads: int) -> float:
    """The best that a float32 matmul does: less than the limit, so that a floor is too high."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a = torch.ones(512, 512)
        seconds = []
        for _ in range(10):
            started = time.perf_counter()
            a @ a
            seconds.append(time.perf_counter() - started)
        return 2 * 512**3 / min(seconds)
    finally:
        torch.set_num_threads(before)


def peak_flops(limits: Limits, dtype: torch.dtype) -> float:
    """The highest multiply-add rate of ``limits`` that serves ``dtype``, in flop/s.

    A half type may be widened, so that the plain multiply-add counts for it too.
    """
    names = [n for n in limits if n.endswith("_gflop_per_s")]
    if dtype in (torch.float32, torch.float64):
        names = [n for n in names if not n.startswith("bf16")]
    return max(limits[n] for n in names) * 1e9


def noise_of(before: Limits, after: Limits) -> float:
    """Largest factor between the same probe taken twice."""
    return max(max(before[n], after[n]) / min(before[n], after[n]) for n in before if n in after)

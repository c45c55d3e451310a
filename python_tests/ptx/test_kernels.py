"""Kernels in CUDA C that are right, and broken ones that must be noticed."""

import struct
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from benchmarks.sass import MissingToolError, find_nvcc
from python_tests.support.ptx import Module, VMError, bf16, from_bf16

SEEDS = range(4)
RNG = np.random.default_rng(1)


@cache
def text() -> str:
    try:
        nvcc = find_nvcc()
    except MissingToolError as error:
        pytest.skip(str(error))
    source = Path(__file__).with_name("kernels.cu")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.ptx"
        command = [nvcc, "-std=c++20", "-ptx", "-arch=sm_80", "-lineinfo", "-o", out, source]
        subprocess.run(command, check=True)
        return out.read_text()


class Bench:
    """One kind of kernel, its arguments and its result."""

    def __init__(self, kernel: str, mistakes: str, launch: dict, arguments: list, want, error=0.0):
        """The last array among the arguments is the result, and begins as it is given."""
        self.kernel, self.launch, self.want, self.error = kernel, launch, want, error
        self.mistakes = ["kNone", *mistakes.split()]
        self.module = Module(text())
        *_, out = (a for a in arguments if isinstance(a, np.ndarray))
        self.initial = out
        self.arguments = [
            self.module.alloc(a, f"argument {i}", readonly=a is not out)
            if isinstance(a, np.ndarray)
            else np.int32(a)
            for i, a in enumerate(arguments)
        ]
        *_, self.out = (a for a in self.arguments if isinstance(a, np.ndarray))

    def run(self, mistake="kNone", seed=0, **options) -> tuple[bool, dict]:
        """Whether the result is right, and the statistics."""
        number = self.mistakes.index(mistake)
        (kernel,) = (
            k.name
            for k in self.module.kernels()
            if f"{len(self.kernel)}{self.kernel}I" in k.name and f"Mistake{number}EE" in k.name
        )
        self.out[...] = self.initial
        given = {"race": True, "seed": seed} | self.launch | options
        statistics = self.module.launch(kernel, args=self.arguments, **given)
        with np.errstate(invalid="ignore"):
            return bool((np.abs(self.out - self.want) <= self.error).all()), statistics


def sums() -> Bench:
    x = RNG.standard_normal(10_007).astype(np.float32)
    launch = {"grid": 6, "block": 256}
    arguments = [x, np.zeros(1, np.float32), x.size]
    want, bound = x.astype(float).sum(), 2.0**-24 * 24 * np.abs(x).sum()  # adds in a chain, at most
    return Bench("sum", "kNoBarrier kWrongMembers kReadsBeyond", launch, arguments, want, bound)


def top_k() -> Bench:
    n, k = 700, 5
    x = RNG.standard_normal((3, n)).astype(np.float32)
    launch = {"grid": 3, "block": 256, "smem": 4 * n}
    want = np.argsort(-x, axis=1, kind="stable")[:, :k]
    return Bench("top_k", "kNoBarrier", launch, [x, np.full((3, k), -1, np.int32), n, k], want)


def histogram(outlier=0) -> Bench:
    bins = 200
    x = RNG.integers(0, bins, 5000).astype(np.int32)
    x[777] += outlier
    launch = {"grid": 2, "block": 256, "smem": 4 * bins}
    want = np.bincount(x, minlength=bins)[:bins]
    arguments = [x, np.zeros(bins, np.uint32), x.size, bins]
    return Bench("histogram", "kNoAtomics kNoBoundsCheck", launch, arguments, want)


def transpose() -> Bench:
    x = RNG.standard_normal((70, 101)).astype(np.float32)
    launch = {"grid": (4, 3), "block": (32, 8)}
    arguments = [x, np.zeros((101, 70), np.float32), 70, 101]
    return Bench("transpose", "kNoBarrier kNoPadding kNoEdges", launch, arguments, x.T)


def matmul() -> Bench:
    m, n, k = 70, 136, 168
    a, b = bf16(RNG.standard_normal((m, k))), bf16(RNG.standard_normal((n, k)))
    launch = {"grid": (3, 2), "block": 128}
    va, vb = from_bf16(a).astype(float), from_bf16(b).astype(float)
    bound = 2.0**-24 * (k / 16 + 1) * (np.abs(va) @ np.abs(vb).T)  # a rounding for each mma
    arguments = [a, b, np.full((m, n), np.nan, np.float32), m, n, k]
    return Bench("matmul", "kNoWait kNoBarrier kNoEdges", launch, arguments, va @ vb.T, bound)


@pytest.mark.parametrize("bench", [sums, top_k, histogram, transpose, matmul])
def test_right_kernels_are_right_under_every_seed(bench):
    b = bench()
    for seed in SEEDS:
        right, statistics = b.run(seed=seed)
        assert right
        assert statistics["races"] == 0, statistics["race_examples"]
        assert statistics["shfl_undefined_reads"] == 0


@pytest.mark.parametrize(
    "bench, mistake",
    [
        (sums, "kNoBarrier"),
        (top_k, "kNoBarrier"),
        (histogram, "kNoAtomics"),
        (transpose, "kNoBarrier"),
        (matmul, "kNoBarrier"),
    ],
)
def test_a_missing_barrier_is_a_hazard_under_every_seed(bench, mistake):
    b = bench()
    runs = [b.run(mistake, seed) for seed in SEEDS]
    assert all(statistics["races"] for _, statistics in runs)
    assert not all(right for right, _ in runs)
    with pytest.raises(VMError, match="shared-memory hazard"):
        b.run(mistake, race_error=True)


def test_without_its_wait_a_copy_is_poison():
    b = matmul()
    for seed in SEEDS:
        right, _ = b.run("kNoWait", seed, race=False)
        assert not right
        assert np.isnan(b.out).any()


@pytest.mark.parametrize(
    "bench, mistake, message",
    [
        (sums, "kWrongMembers", r"member mask \(0x7fffffff\) does not contain it.*void sum<"),
        (
            sums,
            "kReadsBeyond",
            "outside every registered buffer, at byte 40028 of buffer argument 0",
        ),
        (lambda: histogram(outlier=5000), "kNoBoundsCheck", "outside the block's 800 bytes"),
        (transpose, "kNoEdges", "read of 4 bytes .* outside every registered buffer"),
        (matmul, "kNoEdges", "write of 4 bytes .* outside every registered buffer"),
    ],
)
def test_what_stops(bench, mistake, message):
    with pytest.raises(VMError, match=f"(?s){message}"):
        bench().run(mistake)


def test_padding_shows_in_the_count_of_wavefronts():
    b = transpose()
    padded, plain = (b.run(mistake)[1]["shared"] for mistake in ("kNone", "kNoPadding"))
    assert padded["conflict_degree"] == 1
    assert plain["conflict_degree"] > 8


@pytest.mark.parametrize("order", ["linear", "random"])
@pytest.mark.parametrize("seed", SEEDS)
def test_calls_local_memory_structs_and_switches(seed, order):
    n = 300
    m = Module(text())
    out, roots = m.alloc(np.zeros(n, np.int32)), m.alloc(np.zeros(n))
    point = struct.pack("<i4xd3h2x", 77, 2.5, 100, 200, 300)
    m.launch("mixture", 3, 128, args=[out, roots, point, n], seed=seed, order=order)

    def collatz(x):
        return 0 if x == 1 else 1 + collatz(3 * x + 1 if x % 2 else x // 2)

    for i in range(n):
        tens = (10, 20, 30, 40)[i % 4]
        cases = [collatz(i + 1), (i * 5 & 15) * i, (100, 200, 300)[i % 3]]
        cases += [i.bit_count() + tens, 3 * i, 77]
        assert out[i] == cases[i % 6]
    i = np.arange(n)
    assert np.allclose(roots, 2.5 * i / 3 + np.sqrt(i), rtol=2.0**-51, atol=0)


def test_an_assertion_of_the_kernel():
    m = Module(text())
    x = m.alloc(np.arange(32, dtype=np.int32))
    with pytest.raises(VMError, match=r"(?s)assertion failed: x\[threadIdx.x\] != 3.*\(3,0,0\)"):
        m.launch("asserts", 1, 32, args=[x])


def test_an_index_beyond_a_local_array():
    m = Module(text())
    x = m.alloc(np.arange(8, dtype=np.int32))
    m.launch("out_of_local", 1, 1, args=[x, np.int32(5)])
    assert x[0] == 5
    with pytest.raises(VMError, match="local access outside"):
        m.launch("out_of_local", 1, 1, args=[x, np.int32(100_000)])

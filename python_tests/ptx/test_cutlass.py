"""CUTLASS's kernels in the interpreter: that theirs are right there shows that it is right.

make test-cutlass installs the headers and runs these.
"""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks.sass import MissingToolError, find_nvcc
from benchmarks.yardsticks import CUTLASS, find_headers
from python_tests.support.ptx import Module, bf16, from_bf16, pointer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
E4M3 = {0: 0, 0.5: 0x30, 1: 0x38, 1.5: 0x3C, 2: 0x40, 3: 0x44, 4: 0x48}
E4M3 |= {-0.75: 0xB4, -1: 0xB8, -2.5: 0xC2}
RNG = np.random.default_rng(3)


class Cutlass:
    """One file of kernels: their PTX, and the program that knows their parameters."""

    def __init__(self, folder: Path, name: str, arch: str, host_flags=()):
        headers = find_headers().get(CUTLASS)
        if headers is None:
            pytest.skip("no CUTLASS headers: make test-cutlass installs them (nvidia-cutlass)")
        try:
            nvcc = find_nvcc()
        except MissingToolError as error:
            pytest.skip(str(error))
        includes = [f"-I{p}" for p in (ROOT, headers, headers.parent / "tools/util/include")]
        source = Path(__file__).with_name(f"{name}.cu")
        command = [nvcc, "-std=c++17", f"-arch={arch}", "--expt-relaxed-constexpr", "-w", source]
        command += ["-DCUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL=1", *includes]
        subprocess.run([*command, "-O3", "-ptx", "-o", folder / "kernels.ptx"], check=True)
        self._program = folder / "parameters"
        subprocess.run([*command, "-O1", *host_flags, "-o", self._program], check=True)
        self.module = Module(str(folder / "kernels.ptx"))

    def run(self, kernel: str, *numbers, **options) -> dict:
        """Launches it with the arguments of the program, arrays by their addresses."""
        given = [str(pointer(a) if isinstance(a, np.ndarray) else a) for a in numbers]
        command = [self._program, kernel, *given]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        *grid, threads, shared = (int(v) for v in printed[:5])
        parameters = bytes.fromhex(printed[5])
        given = {"params": parameters, "smem": shared} | options
        if "cluster" in given:  # clusters wait for each other's tiles only if they share a grid
            given["resident"] = int(np.prod(grid))
        return self.module.launch(kernel, grid, threads, **given)


@pytest.fixture(scope="module")
def sm80(tmp_path_factory):
    return Cutlass(tmp_path_factory.mktemp("sm80"), "cutlass_sm80", "sm_89")


@pytest.fixture(scope="module")
def sm90(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sm90")
    return Cutlass(folder, "cutlass_sm90", "sm_90a", ["-DHOST_ONLY"])


def e4m3(x: np.ndarray) -> np.ndarray:
    return np.vectorize(E4M3.get, otypes=[np.uint8])(x)


def integers(limit: int, shape) -> np.ndarray:
    return RNG.integers(-limit, limit + 1, shape).astype(float)


# Of each operand type: values, their storage, the result's storage. All but f32 and f64 are exact.
TYPES = {
    "tf32": (lambda s: integers(8, s), np.float32, np.float32),
    "s8": (lambda s: integers(8, s), np.int8, np.int32),
    "f16": (lambda s: integers(2, s), np.float16, np.float16),
    "e4m3": (lambda s: RNG.choice(list(E4M3), s).astype(float), None, np.float32),
    "f32": (RNG.standard_normal, np.float32, np.float32),
    "f64": (RNG.standard_normal, np.float64, np.float64),
}


@pytest.mark.parametrize("size", [(64, 64, 64), (72, 136, 208)])
@pytest.mark.parametrize("name", TYPES)
def test_operand_types(sm80, name, size):
    draw, store, result = TYPES[name]
    m, n, k = size
    va, vb = draw((m, k)), draw((n, k))
    a, b = (e4m3(x) if name == "e4m3" else x.astype(store) for x in (va, vb))
    if name != "e4m3":
        va, vb = a.astype(float), b.astype(float)
    if name == "f16":  # that kernel takes A by columns and B by rows
        a, b = a.T, b.T
    module = sm80.module
    held = [module.alloc(x, label, readonly=True) for x, label in ((a, "a"), (b, "b"))]
    d = module.alloc(np.zeros((m, n), result), "d")
    statistics = sm80.run(name, m, n, k, *held, d, d, 1, 0, seed=k, race=True)
    unit = {"f32": 2.0**-24, "f64": 2.0**-53}.get(name, 0)
    bound = (k + 1) * unit * (np.abs(va) @ np.abs(vb).T)
    assert (np.abs(d - va @ vb.T) <= bound).all()
    assert statistics["races"] == 0
    module.unregister(*held, d)


def rounded_once(want: np.ndarray, magnitude: np.ndarray, k: int) -> np.ndarray:
    """What a bf16 may differ by from a sum that was kept in float32."""
    return 2.0**-8 * np.abs(want) + 2.0**-23 * (k / 16 + 2) * magnitude


@pytest.mark.parametrize("seed", (0, 1, 2))
@pytest.mark.parametrize(
    "name, size",
    [
        ("bf16_tn", (200, 136, 96)),
        ("bf16_tn", (65, 72, 264)),
        ("bf16_tt", (130, 200, 96)),
        ("bf16_tt", (256, 136, 160)),
    ],
)
def test_bf16(sm80, name, size, seed):
    m, n, k = size
    module, to_bf16 = sm80.module, name == "bf16_tt"
    a, b, c = (bf16(RNG.standard_normal(s)) for s in ((m, k), (n, k), (m, n)))
    va, vb, vc = (from_bf16(x).astype(float) for x in (a, b, c))
    given = [a, np.ascontiguousarray(b.T), c] if to_bf16 else [a, b, from_bf16(c)]
    held = [module.alloc(x, "abc"[i], readonly=True) for i, x in enumerate(given)]
    unwritten = np.full_like(c, 0x7FFF) if to_bf16 else np.full((m, n), np.nan, np.float32)
    d = module.alloc(unwritten, "d")
    statistics = sm80.run(name, m, n, k, *held, d, 1.25, 0.5, seed=seed, race=True)
    want = 1.25 * va @ vb.T + 0.5 * vc
    magnitude = 1.25 * np.abs(va) @ np.abs(vb).T + 0.5 * np.abs(vc)
    got = from_bf16(d) if to_bf16 else d
    bound = rounded_once(want if to_bf16 else np.zeros(1), magnitude, k)
    assert (np.abs(got - want) <= bound).all()
    assert statistics["races"] == 0
    module.unregister(*held, d)


@pytest.mark.parametrize("seed", (0, 5))
@pytest.mark.parametrize("blocks", (1, 3, 7))
def test_grouped(sm80, blocks, seed):
    sizes = [(70, 64, 96), (1, 136, 64), (0, 64, 64), (129, 200, 32), (33, 72, 160)]
    module = sm80.module

    def table(values, dtype):
        return module.alloc(np.array(values, dtype), "table", readonly=True)

    def operands(shape):
        return [module.alloc(bf16(RNG.standard_normal(shape(*s))), readonly=True) for s in sizes]

    a = operands(lambda m, n, k: (max(m, 1), k))
    b = operands(lambda m, n, k: (n, k))
    d = [module.alloc(np.full((max(m, 1), n), np.nan, np.float32)) for m, n, _ in sizes]
    pointers = [table([pointer(x) for x in xs], np.uint64) for xs in (a, b, d)]
    strides = [table([s[axis] for s in sizes], np.int64) for axis in (2, 2, 1)]
    tables = [table(sizes, np.int32), *pointers, pointers[2], *strides, strides[2]]
    statistics = sm80.run(
        "grouped", len(sizes), blocks, *tables, 1, 0, seed=seed, race=True, resident=blocks
    )
    for (m, _, k), x, w, y in zip(sizes, a, b, d, strict=True):
        vx, vw = from_bf16(x)[:m].astype(float), from_bf16(w).astype(float)
        bound = rounded_once(np.zeros(1), np.abs(vx) @ np.abs(vw).T, k)
        assert (np.abs(y[:m] - vx @ vw.T) <= bound).all()
    assert statistics["races"] == 0
    module.unregister(*a, *b, *d, *tables)


# Of each kernel: clusters along M and N, whether A and B lie by columns of A and rows of B, sizes.
LARGE = [(128, 128, 64), (256, 256, 192), (200, 136, 328)]
SMALL = [(64, 64, 64), (136, 80, 208)]
SM90 = {
    "plain_tn": ((1, 1), False, False, LARGE),
    "cooperative_tt": ((2, 1), False, True, LARGE),
    "ping_pong_nn": ((1, 2), True, False, LARGE),
    "swizzle_64": ((1, 1), False, True, SMALL),
    "swizzle_32": ((1, 1), False, True, SMALL),
    "e4m3": ((1, 1), False, False, SMALL),
}


@pytest.mark.parametrize("seed", (0, 1))
@pytest.mark.parametrize("name, size", [(n, s) for n, case in SM90.items() for s in case[3]])
def test_sm90(sm90, name, size, seed):
    cluster, a_by_columns, b_by_rows, _ = SM90[name]
    m, n, k = size
    module = sm90.module
    c = bf16(RNG.standard_normal((m, n)))
    if name == "e4m3":
        va, vb = (RNG.choice(list(E4M3), s).astype(float) for s in ((m, k), (n, k)))
        a, b = e4m3(va), e4m3(vb)
    else:
        a, b = (bf16(RNG.standard_normal(s)) for s in ((m, k), (n, k)))
        va, vb = (from_bf16(x).astype(float) for x in (a, b))
    given = [a.T if a_by_columns else a, b.T if b_by_rows else b, c]
    held = [module.alloc(x, "abc"[i], readonly=True) for i, x in enumerate(given)]
    d = module.alloc(np.full((m, n), 0x7FFF, np.uint16), "d")
    statistics = sm90.run(name, m, n, k, *held, d, 1.25, 0.5, seed=seed, cluster=cluster)
    vc = from_bf16(c).astype(float)
    want = 1.25 * va @ vb.T + 0.5 * vc
    magnitude = 1.25 * np.abs(va) @ np.abs(vb).T + 0.5 * np.abs(vc)
    assert (np.abs(from_bf16(d) - want) <= rounded_once(want, magnitude, k)).all()
    assert statistics["bulk"]["bytes_loaded"] > 0
    assert any(kind.startswith("wgmma") for kind in statistics["flops"])
    module.unregister(*held, d)

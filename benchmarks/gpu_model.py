"""A model of the expert layers' kernels on A100 and H100. It predicts; nothing here was measured.

    python -m benchmarks.gpu_model            # the table
    python -m benchmarks.gpu_model --write    # the table into the README, and gpu_model.svg

From counts of the PTX interpreter (benchmarks/gpu_counts.json), figures of the compiler
(benchmarks/sass.json) and the limits of the two GPUs below: pure arithmetic, no GPU, no nvcc. The
same arithmetic is done for the products of CUTLASS and DeepGEMM, so that it compares models with
models.
"""

import argparse
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.gpu_counts import Kernel, read_table
from benchmarks.moe_cases import SHAPES, Shape

ROOT = Path(__file__).parents[1]
README = ROOT / "benchmarks/README.md"
PLOT = ROOT / "benchmarks/gpu_model.svg"
TOKENS = (1, 16, 128, 512, 4096)
MODELLED = ("fine", "olmoe", "qwen3", "deepseek", "mixtral")
# Shares of the peaks that kernels reach where nothing else holds them up.
MEMORY_SHARE, TENSOR_SHARE = 0.9, 0.8
# mma.sync on Hopper reaches this share of wgmma's peak (arXiv 2402.13499).
HOPPER_MMA_SHARE = 0.63
LAUNCH_SECONDS = 2.5e-6
# Clocks from a load's issue to its data from memory, for the chain of a pipeline's stages.
LOAD_CLOCKS = 700
# Where the model's error is quoted, by bound; none where launches take half of the time.
ERROR = {"memory": 20, "tensor": 40, "issue": 40, "shared": 40, "latency": 40}


@dataclass(frozen=True)
class Gpu:
    """Limits of one GPU, without any share that is not reached."""

    name: str
    sms: int
    hertz: float
    bytes_per_second: float
    flops_per_clock: int  # of an SM's tensor cores, bfloat16
    shared_bytes: int  # of an SM
    tensor_share: float = TENSOR_SHARE
    registers: int = 65536
    threads: int = 2048
    issue_per_clock: int = 4

    @property
    def flops_per_second(self) -> float:
        return self.sms * self.hertz * self.flops_per_clock


A100 = Gpu("A100-SXM-80", 108, 1.41e9, 2.0e12, 2048, 164 * 1024)
H100 = Gpu("H100-SXM", 132, 1.83e9, 3.35e12, 4096, 228 * 1024)


@dataclass(frozen=True)
class Prediction:
    """Seconds of one kernel by what would bound it if nothing else did."""

    limits: dict[str, float]
    launches: int = 1

    @property
    def bound(self) -> str:
        return max(self.limits, key=lambda k: self.limits[k])

    @property
    def seconds(self) -> float:
        return max(self.limits.values()) + self.launches * LAUNCH_SECONDS


def blocks_per_sm(gpu: Gpu, threads: int, registers: int, shared: int) -> int:
    """Blocks that an SM holds at a time; registers are given to warps in units of 256."""
    warps = -(-threads // 32)
    of_registers = gpu.registers // (warps * -(-registers * 32 // 256) * 256)
    of_shared = gpu.shared_bytes // (shared + 1024)  # a block's reserve
    return max(min(of_registers, of_shared, gpu.threads // threads, 32), 0)


def memory_seconds(gpu: Gpu, moved: float, share: float = MEMORY_SHARE) -> float:
    return moved / (gpu.bytes_per_second * share)


def tiles_of(rows: np.ndarray, columns: int, kernel: Kernel) -> int:
    """Tiles of a grouped product whose groups have ``rows``; a tile never straddles two."""
    return int((-(-rows // kernel.rows)).sum()) * -(-columns // kernel.columns)


def predict(gpu: Gpu, kernel: Kernel, tiles: int, depth: int, moved: float) -> Prediction:
    """The time of ``tiles`` tiles with ``depth`` reduction steps that move ``moved`` bytes.

    The bytes are those that must cross the memory bus once; what the second-level cache serves
    again is taken to be free. All else is the SM with the most tiles: tensor cores at a share of
    their peak; issue slots, those of sm_80's main loops as SASS and all others as PTX;
    wavefronts of shared memory, one a clock; and, where an SM holds too few tiles to hide it, the
    chain of loads through a block's stages.
    """
    steps = -(-depth // kernel.depth)
    most = -(-tiles // gpu.sms)
    together = blocks_per_sm(gpu, kernel.threads, kernel.registers, kernel.shared)
    flops = 2 * kernel.rows * kernel.columns * kernel.depth * steps * most
    wgmma = kernel.arch == "90a"
    share = gpu.tensor_share * (1 if gpu.name != H100.name or wgmma else HOPPER_MMA_SHARE)
    # Warps that only bring operands have a loop of their own, counted as PTX with the rest.
    stage = kernel.step["instructions"] if wgmma else kernel.loop * kernel.math_warps
    issued = kernel.tile["instructions"] + steps * stage
    wavefronts = kernel.tile["wavefronts"] + steps * kernel.step["wavefronts"]
    if wgmma:  # it reads both operands itself, uncounted: B once for every 64 rows
        lines = kernel.rows + kernel.rows // 64 * kernel.columns
        wavefronts += steps * lines * kernel.depth * 2 / 128
    rounds = -(-most // together)
    chain = rounds * LOAD_CLOCKS * (1 + steps / max(kernel.stages - 1, 1))
    return Prediction(
        {
            "memory": memory_seconds(gpu, moved),
            "tensor": flops / (gpu.flops_per_clock * share) / gpu.hertz,
            "issue": most * issued / gpu.issue_per_clock / gpu.hertz,
            "shared": most * wavefronts / gpu.hertz,
            "latency": chain / gpu.hertz,
        }
    )


def streaming(gpu: Gpu, moved: float) -> Prediction:
    return Prediction({"memory": memory_seconds(gpu, moved)})


@dataclass(frozen=True)
class Layer:
    """One expert layer at work: its shape and the rows of every expert."""

    shape: Shape
    tokens: int
    rows: np.ndarray

    @property
    def slots(self) -> int:
        return self.tokens * self.shape.top_k

    @property
    def used(self) -> int:
        return int((self.rows > 0).sum())


@cache
def layer(shape: str, tokens: int) -> Layer:
    """Tokens that choose their experts with equal chances, as bench_experts draws them."""
    s, g = SHAPES[shape], np.random.default_rng(1000 + tokens)
    ids = np.argsort(g.random((tokens, s.experts)), axis=1)[:, : s.top_k]
    return Layer(s, tokens, np.bincount(ids.reshape(-1), minlength=s.experts))


def our_tile(gpu: Gpu, case: Layer, depth: int) -> tuple[str, int, int]:
    """(architecture, rows, columns) of the tile that the launchers choose for a reduction.

    See grouped::sm80::dispatch_height and grouped::sm90::dispatch_shape; the tiles of a cluster of
    two blocks count as two.
    """
    twice = 2 * case.slots
    experts = case.shape.experts
    if gpu.name == H100.name and twice > 32 * experts:
        if twice <= 64 * experts:
            return "90a", 64, 256
        return "90a", 128, 128 if depth <= 1024 else 256
    return "80", next((h for h in (16, 32, 64) if twice // experts <= h), 128), 128


def our_kernel(gpu: Gpu, case: Layer, kernels: list[Kernel], role: str, depth: int) -> Kernel:
    tile = our_tile(gpu, case, depth)
    return next(
        k
        for k in kernels
        if (k.who, k.role) == ("ours", role) and (k.arch, k.rows, k.columns) == tile
    )


def ours(gpu: Gpu, case: Layer, kernels: list[Kernel]) -> dict[str, Prediction]:
    """Plan, gate_up with the gather and SwiGLU, down, and the weighted sum."""
    h, i = case.shape.hidden, case.shape.intermediate
    gate_up = our_kernel(gpu, case, kernels, "gate_up", h)
    down = our_kernel(gpu, case, kernels, "down", i)
    weights = 2 * case.used * h * i
    return {
        "plan": streaming(gpu, 8 * case.slots),
        "gate_up": predict(
            gpu,
            gate_up,
            tiles_of(case.rows, 2 * i, gate_up),
            h,
            2 * weights + 2 * case.tokens * h + 2 * case.slots * i,
        ),
        "down": predict(
            gpu,
            down,
            tiles_of(case.rows, h, down),
            i,
            weights + 2 * case.slots * i + 4 * case.slots * h,
        ),
        "combine": streaming(gpu, 4 * case.slots * h + 2 * case.tokens * h),
    }


def theirs(gpu: Gpu, case: Layer, kernel: Kernel) -> dict[str, Prediction]:
    """Only the two products, since gather, activation and weighted sum are left to others."""
    h, i = case.shape.hidden, case.shape.intermediate
    weights = 2 * case.used * h * i
    found = {}
    for role, columns, depth, matrices in (("gate_up", 2 * i, h, 2), ("down", h, i, 1)):
        moved = matrices * weights + 2 * case.slots * (depth + columns)
        found[role] = predict(gpu, kernel, tiles_of(case.rows, columns, kernel), depth, moved)
    return found


def contenders(gpu: Gpu, kernels: list[Kernel]) -> dict[str, Kernel | None]:
    """By name; None is ours."""
    arch = "80" if gpu is A100 else "90a"
    found: dict[str, Kernel | None] = {"ours": None}
    return found | {k.who: k for k in kernels if k.role == "nt" and k.arch == arch}


def _products(parts: dict[str, Prediction]) -> Prediction:
    """Both products as one: their times, and the bound of the longer."""
    longer = max((parts["gate_up"], parts["down"]), key=lambda p: p.seconds)
    total = sum(max(parts[k].limits.values()) for k in ("gate_up", "down"))
    return Prediction({longer.bound: total}, launches=2)


def described(p: Prediction) -> str:
    """Microseconds, the bound and the error quoted; no figure where launches take half of it."""
    if p.launches * LAUNCH_SECONDS >= p.seconds / 2:
        return "launch"
    return f"{p.seconds * 1e6:.0f} ({p.bound}, ±{ERROR[p.bound]} %)"


@dataclass(frozen=True)
class Row:
    gpu: Gpu
    shape: str
    tokens: int
    parts: dict[str, dict[str, Prediction]]  # by contender

    def layer(self) -> Prediction:
        """Our whole layer."""
        mine = self.parts["ours"].values()
        longest = max(mine, key=lambda p: p.seconds)
        total = sum(max(p.limits.values()) for p in mine)
        return Prediction({longest.bound: total}, launches=len(mine))


def rows(kernels: list[Kernel], gpu: Gpu) -> list[Row]:
    found = []
    for shape in MODELLED:
        for tokens in TOKENS:
            case = layer(shape, tokens)
            parts = {
                name: theirs(gpu, case, k) if k else ours(gpu, case, kernels)
                for name, k in contenders(gpu, kernels).items()
            }
            found.append(Row(gpu, shape, tokens, parts))
    return found


def markdown(kernels: list[Kernel]) -> str:
    lines = []
    for gpu in (A100, H100):
        others = [name for name in contenders(gpu, kernels) if name != "ours"]
        lines += [
            f"**Model, not measured: {gpu.name}**, bfloat16, balanced routing; microseconds",
            "",
        ]
        head = ["shape", "tokens", "tiles", "whole layer, model of ours"]
        head += ["both products, model of ours", *(f"model of {name}'s" for name in others)]
        head += ["model / model"]
        lines.append("| " + " | ".join(head) + " |")
        lines.append("| --- | ---: |" + " --- |" * (len(head) - 3) + " ---: |")
        for r in rows(kernels, gpu):
            products = {name: _products(parts) for name, parts in r.parts.items()}
            mine, best = products["ours"], min(products[n].seconds for n in others)
            case = layer(r.shape, r.tokens)
            depths = (case.shape.hidden, case.shape.intermediate)
            tiles = ["{}x{}".format(*our_tile(gpu, case, depth)[1:]) for depth in depths]
            cells = [r.shape, r.tokens, ", ".join(dict.fromkeys(tiles)), described(r.layer())]
            cells += [described(mine), *(described(products[n]) for n in others)]
            known = "launch" not in map(described, products.values())
            cells.append(f"{mine.seconds / best:.2f}" if known else "")
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


def plot(kernels: list[Kernel], path: Path) -> None:
    """Operations per second over operations per byte of weights, under each GPU's roof."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "gpu_model"
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, gpu in zip(axes, (A100, H100), strict=True):
        x = np.logspace(0, 3.5, 100)
        roof = np.minimum(x * gpu.bytes_per_second, gpu.flops_per_second) / 1e12
        axis.plot(x, roof, color="0.6", label="roof")
        for name, marker in zip(contenders(gpu, kernels), "osD^", strict=False):
            points = []
            for r in rows(kernels, gpu):
                case = layer(r.shape, r.tokens)
                flops = 6 * case.slots * case.shape.hidden * case.shape.intermediate
                read = 6 * case.used * case.shape.hidden * case.shape.intermediate
                seconds = _products(r.parts[name]).seconds
                points.append((flops / read, flops / seconds / 1e12))
            axis.plot(*zip(*points, strict=True), marker, ms=4, label=f"model of {name}")
        axis.set(xscale="log", yscale="log", title=f"Model, not measured: {gpu.name}")
        axis.set_xlabel("operations per byte of weights")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("TFLOP/s of both products")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def write(kernels: list[Kernel]) -> None:
    text, begin, end = README.read_text(), "<!-- gpu_model: begin -->", "<!-- gpu_model: end -->"
    before, rest = text.split(begin)
    content = f"![Models of the products under the roofs](gpu_model.svg)\n\n{markdown(kernels)}"
    README.write_text(f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}")
    plot(kernels, PLOT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the README's table and plot")
    args = parser.parse_args()
    kernels = read_table()
    print(markdown(kernels))
    if args.write:
        write(kernels)
    return 0


if __name__ == "__main__":
    sys.exit(main())

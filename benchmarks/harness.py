"""Times the contenders of a bench file and prints one JSON line for each.

A bench file defines OP, CASES, make(case, device), work(case) and CONTENDERS (see README.md here).
"""

import argparse
import json
import platform
import statistics
import sys
import time

import torch

# Larger than the last cache of the machines we know, so that a flush leaves nothing behind.
FLUSH_BYTES = 512 << 20


def _probe_copy_bandwidth() -> float:
    """GB/s (read + write) of a plain copy beyond the cache: what the machine gives us right now."""
    source = torch.ones(64 << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - started)
    return 2 * source.numel() / best / 1e9


def _probe_matmul() -> float:
    """TFLOP/s of one bfloat16 matmul that fits the cache."""
    a = torch.ones(1024, 1024, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best / 1e12


def probes() -> dict:
    return {
        "copy_gb_per_s": round(_probe_copy_bandwidth(), 2),
        "matmul_tflop_per_s": round(_probe_matmul(), 3),
    }


class _Timer:
    """Seconds of one call: events on CUDA, the monotonic clock on a CPU; caches flushed before."""

    def __init__(self, device: str):
        self.device = device
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, function, args) -> float:
        self._flush.add_(1)
        if self.device == "cpu":
            started = time.perf_counter()
            function(*args)
            return time.perf_counter() - started
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function(*args)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def _leaves(value):
    return [value] if isinstance(value, torch.Tensor) else [t for v in value for t in _leaves(v)]


def _check_agreement(names, results, tolerance=2e-2) -> None:
    """Refuses to time contenders that compute different things."""
    for name, result in zip(names[1:], results[1:], strict=True):
        for ours, theirs in zip(_leaves(results[0]), _leaves(result), strict=True):
            if not ours.dtype.is_floating_point:
                same = torch.equal(ours.long(), theirs.long())
            else:
                a, b = ours.double(), theirs.double()
                same = (a - b).norm() <= tolerance * b.norm() + 1e-30
            if not same:
                raise SystemExit(f"{name} disagrees with {names[0]}; nothing was timed")


def run_case(module, case: dict, device: str, repeats: int) -> list[dict]:
    """Time every contender of one case, interleaved, and return one row for each."""
    args = module.make(case, device)
    names = list(module.CONTENDERS)
    results = [module.CONTENDERS[name](*args) for name in names]
    # Contenders of another precision by design say how far apart they may be.
    _check_agreement(names, results, getattr(module, "AGREEMENT", 2e-2))
    timer = _Timer(device)
    seconds = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            seconds[name].append(timer(module.CONTENDERS[name], args))
    moved, flops = module.work(case)
    rows = []
    for name in names:
        median = statistics.median(seconds[name])
        quartiles = statistics.quantiles(seconds[name], n=4) if repeats > 1 else [median] * 3
        rows.append(
            {
                "contender": name,
                "best_s": min(seconds[name]),
                "median_s": median,
                "iqr_s": quartiles[2] - quartiles[0],
                "gb_per_s": moved / median / 1e9,
                "tflop_per_s": flops / median / 1e12,
            }
        )
    return rows


def main(module_name: str | object) -> None:
    """Command line shared by all bench files; pass ``__name__``."""
    module = sys.modules[module_name] if isinstance(module_name, str) else module_name
    parser = argparse.ArgumentParser(description=f"Time {module.OP} against its contenders.")
    parser.add_argument("--case", action="append", choices=sorted(module.CASES), help="default all")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--smoke", action="store_true", help="the smallest case, once")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = (
        ["smoke"] if options.smoke else options.case or [c for c in module.CASES if c != "smoke"]
    )
    common = {
        "op": module.OP,
        "device": platform.processor() or platform.machine()
        if options.device == "cpu"
        else torch.cuda.get_device_name(),
        "threads": options.threads,
        "torch": torch.__version__,
    }
    before = probes()
    for name in names:
        rows = run_case(
            module, module.CASES[name], options.device, 1 if options.smoke else options.repeats
        )
        for row in rows:
            print(json.dumps({**common, "case": name, **row}), flush=True)
    print(json.dumps({**common, "probes_before": before, "probes_after": probes()}), flush=True)

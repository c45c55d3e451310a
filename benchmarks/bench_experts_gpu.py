"""The experts of a Mixture-of-Experts layer on a GPU, ours and our peers', against the model.

    python -m benchmarks.bench_experts_gpu --jsonl experts_gpu.jsonl
    python -m benchmarks.bench_experts_gpu --shapes olmoe,mixtral --tokens 1,4096 --modes training

Every contender is checked against float64 first, then all take turns: CUDA events around a call,
the second-level cache overwritten before it, the clocks read before and after each case. Ours are
compared with what benchmarks.gpu_model predicts. Needs a GPU and a build for it: make bench-gpu.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import gpu_counts, gpu_machine, gpu_model
from benchmarks.bench_experts import _numbers, _words
from benchmarks.experts_contenders import Contender, Missing
from benchmarks.experts_contenders_gpu import CONTENDERS, PREDICTED
from benchmarks.moe_cases import (
    BOUNDS,
    ROUTINGS,
    SHAPES,
    Case,
    Expected,
    Inputs,
    Weights,
    checked_expert,
    make_inputs,
    make_weights,
    reference,
    sample_of,
    some_rows,
    training_reference,
    work,
)

OP = "experts_gpu"
TOKENS = (1, 16, 128, 512, 4096)
SHAPES_MEASURED = ("fine", "olmoe", "qwen3", "deepseek", "mixtral")
FLUSH_BYTES = 256 << 20  # beyond any second-level cache that we know


class Timer:
    """Seconds of a call between two events, with a cold second-level cache."""

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, call) -> float:
        self._flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def on_device(value, device: str):
    """A dataclass of tensors on a device."""
    moved = {f.name: getattr(value, f.name).to(device) for f in dataclasses.fields(value)}
    return type(value)(**moved)


def call_of(contender: Contender, case: Case, inputs: Inputs):
    return contender.forward(inputs) if case.mode == "forward" else contender.training(inputs)


def parts_of(case: Case, result, inputs: Inputs) -> list[torch.Tensor]:
    """What is compared with the reference: see benchmarks.moe_cases."""
    sample = sample_of(case.tokens)
    if case.mode == "forward":
        return [result.cpu()[sample]]
    grad_x, grad_gate_up, grad_down, grad_mix = (t.cpu() for t in result)
    e = checked_expert(inputs)
    return [grad_x[sample], some_rows(grad_gate_up[e]), some_rows(grad_down[e]), grad_mix[sample]]


def error_of(case: Case, parts: Sequence[torch.Tensor], expected: Sequence[Expected]) -> float:
    """Largest relative error of the parts, by norm.

    Raises:
        Missing: It is above the bound; nothing is timed then.
    """
    errors = [
        float((got.double() - want.value).norm()) / want.scale
        for got, want in zip(parts, expected, strict=True)
    ]
    # NaN compares false with everything, so it has to be asked for.
    worst = max(errors) if all(e == e for e in errors) else float("nan")
    bound = BOUNDS[case.dtype] * (1 if case.mode == "forward" else 2**0.5)
    if not worst <= bound:
        raise Missing(f"wrong: relative error {worst:.2g}, bound {bound:.2g}")
    return worst


def modelled(gpu_name: str) -> gpu_model.Gpu | None:
    """The modelled GPU of that name, or None."""
    known = {"A100": gpu_model.A100, "H100": gpu_model.H100}
    return next((gpu for name, gpu in known.items() if name in gpu_name), None)


def prediction(gpu_name: str, case: Case, inputs: Inputs) -> dict:
    """What the model says of ours for these very tokens; nothing where it does not speak of it."""
    gpu = modelled(gpu_name)
    if gpu is None or case.mode != "forward" or case.dtype not in ("bfloat16", "float16"):
        return {}
    shape = SHAPES[case.shape]
    rows = torch.bincount(inputs.topk_ids.reshape(-1).cpu(), minlength=shape.experts).numpy()
    layer = gpu_model.Layer(shape, case.tokens, rows)
    parts = {"ours": gpu_model.ours(gpu, layer, gpu_counts.read_table())}
    found = gpu_model.Row(gpu, case.shape, case.tokens, parts).layer()
    return {"predicted_s": found.seconds, "predicted": gpu_model.described(found)}


def run_case(
    case: Case, names: Sequence[str], weights: tuple[Weights, Weights], repeats: int, timer
) -> list[dict]:
    """Measure one case; a row for each contender. ``weights`` lie on the CPU and on the GPU."""
    shape, dtype = SHAPES[case.shape], getattr(torch, case.dtype)
    inputs = make_inputs(shape, dtype, case.routing, case.tokens)
    there = on_device(inputs, weights[1].down.device.type)
    check = reference if case.mode == "forward" else training_reference
    expected = check(weights[0], inputs, sample_of(case.tokens))
    moved, flops = work(shape, dtype, inputs, case.mode)
    gpu = torch.cuda.get_device_name()
    common = {"op": OP, **dataclasses.asdict(case), "gpu": gpu, "bytes": moved, "flops": flops}
    common |= {"torch": torch.__version__, "clocks_before": gpu_machine.clocks()}
    calls, rows = {}, {}
    for name in names:
        row = rows[name] = dict(common, contender=name)
        try:
            contender = CONTENDERS[name]()
            contender.refuse(case)
            contender.load(weights[1], 1)
            call = call_of(contender, case, there)
            row["error"] = error_of(case, parts_of(case, call(), inputs), expected)
            calls[name] = call
        except Missing as error:
            row["missing"] = str(error)
        except Exception as error:  # of a library, at its first call
            row |= {"missing": f"{type(error).__name__}: {error}".splitlines()[0], "failed": True}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 2):  # two to warm up
        for name, call in calls.items():
            seconds[name].append(timer(call))
    after = gpu_machine.clocks()
    for name, row in rows.items():
        row["clocks_after"] = after
        if taken := seconds.get(name, [])[2:]:
            quartiles = statistics.quantiles(taken, n=4) if len(taken) > 1 else taken * 3
            row |= {"best_s": min(taken), "median_s": statistics.median(taken)}
            row |= {"iqr_s": quartiles[2] - quartiles[0]}
            row |= {"gb_per_s": moved / row["median_s"] / 1e9}
            row |= {"tflop_per_s": flops / row["median_s"] / 1e12}
            if name == PREDICTED:
                row |= prediction(gpu, case, inputs)
    return list(rows.values())


def markdown(rows: Sequence[dict]) -> str:
    """Medians in microseconds, and ours over what the model predicted."""
    names = list(dict.fromkeys(r["contender"] for r in rows if "median_s" in r))
    head = ["shape", "mode", "routing", "tokens", *names, "model of ours", "measured / model"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * 3 + " ---: |" * (len(head) - 3)]
    cases: dict[tuple, dict[str, dict]] = {}
    for r in rows:
        key = tuple(r[f] for f in ("shape", "mode", "routing", "tokens"))
        cases.setdefault(key, {})[r["contender"]] = r
    for key, by_name in cases.items():
        cells = [*map(str, key)]
        for name in names:
            found = by_name.get(name, {}).get("median_s")
            cells.append("" if found is None else f"{found * 1e6:.0f}")
        mine = by_name.get(PREDICTED, {})
        cells.append(mine.get("predicted", ""))
        known = "median_s" in mine and mine.get("predicted", "launch") != "launch"
        cells.append(f"{mine['median_s'] / mine['predicted_s']:.2f}" if known else "")
        lines.append("| " + " | ".join(cells) + " |")
    reasons = {f"{r['contender']}: {r['missing']}" for r in rows if "missing" in r}
    return "\n".join([*lines, "", *(f"Missing: {reason}" for reason in sorted(reasons))])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shapes", type=_words(list(SHAPES)), default=list(SHAPES_MEASURED))
    add("--dtypes", type=_words(list(BOUNDS)), default=["bfloat16"])
    add("--modes", type=_words(["forward", "training"]), default=["forward"])
    add("--routings", type=_words(ROUTINGS), default=["balanced"])
    add("--tokens", type=_numbers, default=list(TOKENS))
    add("--contenders", type=_words(list(CONTENDERS)), default=list(CONTENDERS))
    add("--repeats", type=int, default=20)
    add("--jsonl", type=Path, help="append rows to this file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench_experts_gpu: no GPU that torch can use; nothing was measured", file=sys.stderr)
        return 2
    stream = options.jsonl.open("a") if options.jsonl else sys.stdout
    timer, rows = Timer(), []
    for shape in options.shapes:
        for dtype in options.dtypes:
            weights = make_weights(SHAPES[shape], getattr(torch, dtype))
            both = weights, on_device(weights, "cuda")
            for mode in options.modes:
                for routing in options.routings:
                    for tokens in options.tokens:
                        case = Case(shape, dtype, 1, mode, routing, tokens)
                        found = run_case(case, options.contenders, both, options.repeats, timer)
                        for row in found:
                            print(json.dumps(row), file=stream, flush=True)
                        rows += found
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

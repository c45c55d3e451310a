"""The experts of a Mixture-of-Experts layer, ours and our peers', side by side in one run.

Every case is checked against float64 for each contender, then timed in rounds in which the
contenders take turns, with the caches flushed before every call and the machine's limits measured
before and after. See README.md here.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.experts_contenders import CONTENDERS, Missing
from benchmarks.isolated import runner
from benchmarks.moe_cases import (
    BOUNDS,
    ROUTINGS,
    SHAPES,
    Case,
    Expected,
    Inputs,
    Shape,
    Weights,
    checked_expert,
    make_inputs,
    make_weights,
    reference,
    sample_of,
    training_reference,
    work,
)
from benchmarks.roofline import NOISE, Limits, Probe, noise_of, peak_flops

OP = "experts"
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# Larger shapes take long: fewer of them by default.
FEW_TOKENS = (1, 16, 128, 512)
TRAINING_TOKENS = (128, 512, 2048)


@dataclasses.dataclass(frozen=True)
class Options:
    """How much to measure."""

    repeats: int
    case_seconds: float
    call_seconds: float
    cold: bool


class Bench:
    """The contenders, the machine's probe, and where the rows go."""

    def __init__(self, names: Sequence[str], peers: str | None, options: Options, emit) -> None:
        self._options, self._emit = options, emit
        self._weights: tuple[tuple[Shape, torch.dtype], Weights] | None = None
        self._runners = {name: runner(name, peers, self._weights_of) for name in names}
        self._probe = Probe(torch.ones(harness.FLUSH_BYTES, dtype=torch.uint8))
        self._expected: dict[Case, list[Expected]] = {}
        self._limits: tuple[int, Limits] | None = None
        # Seconds per slot that a contender took last, by what its speed depends on.
        self._paces: dict[tuple, float] = {}

    def _weights_of(self, shape: Shape, dtype: torch.dtype) -> Weights:
        """The weights of a shape; only the last are kept."""
        if self._weights is None or self._weights[0] != (shape, dtype):
            self._weights = None
            self._expected.clear()
            for each in self._runners.values():
                each.release()
            self._weights = (shape, dtype), make_weights(shape, dtype)
        return self._weights[1]

    def close(self) -> None:
        for each in self._runners.values():
            each.close()

    def run(self, case: Case) -> list[dict]:
        """Measure one case; return (and emit) a row per contender."""
        shape, dtype = SHAPES[case.shape], getattr(torch, case.dtype)
        inputs = make_inputs(shape, dtype, case.routing, case.tokens)
        expected = self._expect(case, inputs)
        before = self._limits_of(case.threads, fresh=False)
        ready, rows = [], {}
        for name, each in self._runners.items():
            row = {"op": OP, **dataclasses.asdict(case), "contender": name}
            try:
                self._check_pace(name, case)
                row["variant"] = each.prepare(case)
                self._flush()
                first, parts = each.first(sample_of(case.tokens).tolist(), checked_expert(inputs))
                row["error"] = self._error(case, parts, expected)
                row["seconds"] = [first]
                ready.append(name)
                self._pace(name, case, first)
            except Missing as error:
                row["missing"] = str(error)
            except (RuntimeError, TypeError, ValueError, AttributeError) as error:
                # Not a known limit, so the case does not count as done.
                row |= {"missing": str(error).splitlines()[0], "failed": True}
            rows[name] = row
        self._rounds(ready, rows)
        after = self._limits_of(case.threads, fresh=True)
        floor = self._floor(case, inputs, before, after)
        noise = noise_of(before, after)
        for row in rows.values():
            row |= {**floor, "noise": noise, "noisy": noise > NOISE, "cold": self._options.cold}
            self._finish(row)
            self._emit(row)
        return list(rows.values())

    def _rounds(self, ready: Sequence[str], rows: dict[str, dict]) -> None:
        """Time the contenders in turn; the call that was checked warmed them up."""
        options = self._options
        started, firsts = time.perf_counter(), {name: rows[name]["seconds"][0] for name in ready}
        for done in range(options.repeats):
            for name in ready:
                # Of a slow contender the call that was checked counts; of others two at least.
                slow = firsts[name] > options.case_seconds / 4
                late = time.perf_counter() - started > options.case_seconds
                if (done >= 2 and late) or (slow and done >= 1):
                    continue
                self._flush()
                seconds = self._runners[name].time()
                rows[name]["seconds"] = ([] if done == 0 else rows[name]["seconds"]) + [seconds]
                self._paces[_pace_key(name, rows[name])] = seconds / rows[name]["tokens"]

    def _flush(self) -> None:
        if self._options.cold:
            self._probe.flush()

    def _check_pace(self, name: str, case: Case) -> None:
        """Refuse what would take too long, going by fewer tokens."""
        pace = self._paces.get(_pace_key(name, dataclasses.asdict(case)))
        most = self._options.call_seconds
        if pace is not None and (seconds := pace * case.tokens) > most:
            raise Missing(f"left out: about {seconds:.0f} s a call, --call-seconds {most:g}")

    def _pace(self, name: str, case: Case, seconds: float) -> None:
        self._paces[_pace_key(name, dataclasses.asdict(case))] = seconds / case.tokens

    def _expect(self, case: Case, inputs: Inputs) -> list[Expected]:
        """What the contenders must compute, whatever the number of threads."""
        key = dataclasses.replace(case, threads=1)
        if key not in self._expected:
            weights = self._weights_of(SHAPES[case.shape], getattr(torch, case.dtype))
            function = reference if case.mode == "forward" else training_reference
            torch.set_num_threads(case.threads)
            self._expected[key] = function(weights, inputs, sample_of(case.tokens))
        return self._expected[key]

    def _error(self, case: Case, parts: Sequence, expected: Sequence[Expected]) -> float:
        """Largest relative error of the parts, by norm.

        Raises:
            Missing: It is above the bound; nothing is timed then.
        """
        errors = []
        for got, want in zip(parts, expected, strict=True):
            off = (torch.from_numpy(got).double() - want.value).norm()
            errors.append(float(off) / want.scale)
        # NaN compares false with everything, so it has to be asked for.
        worst = max(errors) if all(e == e for e in errors) else float("nan")
        bound = BOUNDS[case.dtype] * (1 if case.mode == "forward" else 2**0.5)
        if not worst <= bound:
            raise Missing(f"wrong: relative error {worst:.2g}, bound {bound:.2g}")
        return worst

    def _limits_of(self, threads: int, *, fresh: bool) -> Limits:
        if fresh or self._limits is None or self._limits[0] != threads:
            self._limits = threads, self._probe.limits(threads)
        return self._limits[1]

    def _floor(self, case: Case, inputs: Inputs, before: Limits, after: Limits) -> dict:
        """What the machine needs at least, by both limits; the better probe of each counts."""
        shape, dtype = SHAPES[case.shape], getattr(torch, case.dtype)
        moved, flops = work(shape, dtype, inputs, case.mode)
        best = {name: max(before[name], after.get(name, 0)) for name in before}
        by_bytes, by_flops = moved / best["read_gb_per_s"] / 1e9, flops / peak_flops(best, dtype)
        return {
            "bytes": moved,
            "flops": flops,
            "floor_bytes_s": by_bytes,
            "floor_flops_s": by_flops,
            "floor_s": max(by_bytes, by_flops),
            "probes_before": before,
            "probes_after": after,
        }

    def _finish(self, row: dict) -> None:
        if "seconds" not in row:
            return
        seconds = row.pop("seconds")
        quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        row |= {
            "best_s": min(seconds),
            "median_s": statistics.median(seconds),
            "iqr_s": quartiles[2] - quartiles[0],
            "repeats": len(seconds),
            "x_floor": min(seconds) / row["floor_s"],
            "gflop_per_s": row["flops"] / min(seconds) / 1e9,
        }


def _pace_key(name: str, row: dict) -> tuple:
    return name, *(row[key] for key in ("shape", "dtype", "threads", "mode", "routing"))


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """The cases asked for; those that share weights and packed copies follow one another."""
    for shape in options.shapes:
        for dtype in options.dtypes:
            for threads in options.threads:
                for mode in options.modes:
                    for routing in options.routings:
                        for tokens in options.tokens or _tokens(shape, mode):
                            yield Case(shape, dtype, threads, mode, routing, tokens)


def _tokens(shape: str, mode: str) -> Sequence[int]:
    if mode == "training":
        return TRAINING_TOKENS
    return TOKENS if shape in ("fine", "smoke") else FEW_TOKENS


def done_in(rows: Sequence[dict], names: Sequence[str]) -> set[Case]:
    """Cases of which ``rows`` have a quiet row of every contender asked for, none failed."""
    found: dict[Case, set[str]] = {}
    for row in rows:
        if row.get("op") == OP and not row["noisy"] and not row.get("failed"):
            case = Case(**{f.name: row[f.name] for f in dataclasses.fields(Case)})
            found.setdefault(case, set()).add(row["contender"])
    return {case for case, those in found.items() if those >= set(names)}


def _words(choices: Sequence[str]):
    def parse(text: str) -> list[str]:
        words = text.split(",")
        if unknown := [w for w in words if w not in choices]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(choices)}")
        return words

    return parse


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shapes", type=_words(list(SHAPES)), default=["fine"], help=", ".join(SHAPES))
    add("--dtypes", type=_words(list(BOUNDS)), default=["bfloat16"], help=", ".join(BOUNDS))
    add("--threads", type=_numbers, default=[1, 2])
    add("--modes", type=_words(["forward", "training"]), default=["forward"])
    add("--routings", type=_words(ROUTINGS), default=["balanced"])
    add("--tokens", type=_numbers, help="default: 1 to 4096 for fine, four counts for the others")
    add("--contenders", type=_words(list(CONTENDERS)), default=list(CONTENDERS))
    add("--peers", metavar="DIR", help="site-packages folder with vllm and kt_kernel")
    add("--repeats", type=int, default=7, help="rounds of a case at most")
    add("--case-seconds", type=float, default=15, help="no new round after this long")
    add("--call-seconds", type=float, default=20, help="leave out calls expected to take longer")
    add("--budget", type=float, default=float("inf"), help="seconds; no case starts after them")
    add("--cache", choices=["cold", "warm"], default="cold", help="flush before each call or not")
    add("--jsonl", type=Path, help="append rows to this file; cases that it has are skipped")
    return parser


def main(arguments: Sequence[str] | None = None) -> list[dict]:
    """Run the bench; return the new rows."""
    started = time.monotonic()
    options = _parser().parse_args(arguments)
    earlier: list[dict] = []
    if options.jsonl is not None and options.jsonl.exists():
        earlier = [json.loads(line) for line in options.jsonl.read_text().splitlines()]
    skip, rows = done_in(earlier, options.contenders), []
    todo = [case for case in cases(options) if case not in skip]
    print(f"{len(todo)} cases; {len(skip)} are in the file already", file=sys.stderr)
    stream = options.jsonl.open("a") if options.jsonl else sys.stdout
    common = {"torch": torch.__version__, "cpu": processor()}

    def emit(row: dict) -> None:
        row |= common
        rows.append(row)
        print(json.dumps(row), file=stream, flush=True)

    limits = Options(
        options.repeats, options.case_seconds, options.call_seconds, options.cache == "cold"
    )
    bench = Bench(options.contenders, options.peers, limits, emit)
    last = 0.0
    try:
        for number, case in enumerate(todo):
            spent = time.monotonic() - started
            # The next case is likely to be longer than the last: more tokens.
            if spent + last > options.budget:
                print(
                    f"out of time, {len(todo) - number} cases left; run it again", file=sys.stderr
                )
                break
            say(case, bench.run(case))
            last = time.monotonic() - started - spent
    finally:
        bench.close()
        if options.jsonl:
            stream.close()
    return rows


def processor() -> str:
    """The processor's name and the instructions that matter here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    flags = facts.get("flags", "").split()
    has = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return f"{facts.get('model name', 'unknown')} ({', '.join(has)})"


def say(case: Case, rows: Sequence[dict]) -> None:
    """One line per case, for whoever watches."""
    row = rows[0]
    floors = f"floor {row['floor_s'] * 1e3:.3g} ms (bytes {row['floor_bytes_s'] * 1e3:.3g}, flops "
    floors += f"{row['floor_flops_s'] * 1e3:.3g})"
    times = [f"{row['contender']} {row['best_s'] * 1e3:.3g}" for row in rows if "best_s" in row]
    missing = [row["contender"] for row in rows if "missing" in row]
    noise = f" NOISY ({row['noise']:.2f})" if row["noisy"] else ""
    text = f"{case}: {floors}; ms: {', '.join(times)}{noise}"
    print(text + (f"; missing: {', '.join(missing)}" if missing else ""), file=sys.stderr)


if __name__ == "__main__":
    main()

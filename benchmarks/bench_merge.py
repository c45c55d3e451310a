"""Whole merges: our command line, mergekit's, and the floor of reading and writing as much.

    python -m benchmarks.bench_merge --size 0.5GB --mergekit VENV/bin/python --rounds 3
    python -m benchmarks.bench_merge --memory --methods linear,ties

Contenders take turns, one process at a time. README.md here says how to read what it prints.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.checkpoints import make_checkpoints
from benchmarks.processes import Cost, floor, measure, settle
from mergeme_ext.io import CheckpointSource, format_size, parse_size
from mergeme_ext.report import text_table

ROOT = Path(__file__).parents[1]
OP = "merge"
_TWO = "models: [{model: A, parameters: {PER_MODEL}}, {model: B, parameters: {PER_MODEL}}]"
_DELTAS = "base_model: BASE\n" + _TWO
# Per method: the recipe without merge_method and dtype. BASE, A and B become folders. Every method
# that mergekit 0.1.5 and we have, by the names and with the parameters that both accept.
RECIPES = {
    "linear": "models:\n"
    "  - {model: BASE, parameters: {weight: 0.4}}\n"
    "  - {model: A, parameters: {weight: 0.3}}\n"
    "  - {model: B, parameters: {weight: 0.3}}",
    "slerp": "base_model: A\nmodels: [{model: A}, {model: B}]\nparameters: {t: 0.4}",
    "nuslerp": _TWO.replace("PER_MODEL", "weight: 0.5"),
    "multislerp": _DELTAS.replace("PER_MODEL", "weight: 0.5"),
    "karcher": "models: [{model: BASE}, {model: A}, {model: B}]",
    "task_arithmetic": _DELTAS.replace("PER_MODEL", "weight: 0.5"),
    "ties": _DELTAS.replace("PER_MODEL", "weight: 0.5, density: 0.4"),
    "dare_linear": _DELTAS.replace("PER_MODEL", "weight: 0.5, density: 0.5"),
    "dare_ties": _DELTAS.replace("PER_MODEL", "weight: 0.5, density: 0.5"),
    "della": _DELTAS.replace("PER_MODEL", "weight: 0.5, density: 0.5, epsilon: 0.15"),
    "della_linear": _DELTAS.replace("PER_MODEL", "weight: 0.5, density: 0.5, epsilon: 0.15"),
    "breadcrumbs": _DELTAS.replace("PER_MODEL", "weight: 0.5, density: 0.8, gamma: 0.01"),
    "breadcrumbs_ties": _DELTAS.replace("PER_MODEL", "weight: 0.5, density: 0.8, gamma: 0.01"),
    "sce": "base_model: BASE\nmodels: [{model: A}, {model: B}]\nparameters: {select_topk: 0.5}",
    "model_stock": "base_model: BASE\nmodels: [{model: A}, {model: B}]",
    "arcee_fusion": "base_model: BASE\nmodels: [{model: A}]",
    "nearswap": "base_model: BASE\nmodels: [{model: A}]\nparameters: {t: 0.001}",
    "ram": "base_model: BASE\nmodels: [{model: A}, {model: B}]",
    "passthrough": "models: [{model: A}]",
}
MEMORY_SIZES = ("0.5GB", "2GB", "6GB")
MEMORY_METHODS = "linear,slerp,ties,dare_ties,della,model_stock"
# What the interpreter and torch take before a tensor is touched.
MEMORY_ALLOWANCE = 400 * 10**6
# Probes that differ by more say that the machine was doing something else.
NOISE = 1.15


@dataclass(frozen=True)
class Contender:
    """A program that merges: how to start it and how long it takes to start."""

    name: str
    start: tuple[str, ...]
    flags: tuple[str, ...]

    def command(self, recipe: Path, out: Path) -> list[str]:
        return [*self.start, str(recipe), str(out), *self.flags]

    def import_cost(self) -> Cost:
        """What its help takes, for which it imports what it starts a merge with."""
        return measure([*self.start, "--help"], cwd=ROOT)


def recipe_of(method: str, folders: Sequence[Path]) -> str:
    """The recipe's text, with ``folders`` for BASE, A and B."""
    text = f"merge_method: {method}\n{RECIPES[method]}\ndtype: bfloat16\n"
    for word, folder in zip(("BASE", "A", "B"), folders, strict=True):
        text = text.replace(f"model: {word}", f"model: {json.dumps(str(folder))}")
    return text


def inputs_of(method: str, folders: Sequence[Path]) -> list[Path]:
    """The weight files that a merge by ``method`` reads."""
    read = set(re.findall(r"model: (BASE|A|B)\b", RECIPES[method]))
    chosen = [f for word, f in zip(("BASE", "A", "B"), folders, strict=True) if word in read]
    return [path for folder in chosen for path in sorted(folder.glob("*.safetensors"))]


def weights_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def differences(ours: Path, theirs: Path) -> dict:
    """How the outputs differ: the share of equal elements, and of those within one rounding."""
    a, b = CheckpointSource(ours), CheckpointSource(theirs)
    total = equal = close = 0
    largest = 0.0
    for name in a.names:
        if name not in b or a.info(name).shape != b.info(name).shape:
            return {"differ": f"{name!r} is not in both, or not of one shape"}
        pairs = zip(
            a.tensor(name).flatten().split(1 << 20),
            b.tensor(name).flatten().split(1 << 20),
            strict=True,
        )
        for x, y in pairs:
            steps = (_ordinal(x.bfloat16()) - _ordinal(y.bfloat16())).abs()
            total += steps.numel()
            equal += int((steps == 0).sum())
            close += int((steps <= 1).sum())
            largest = max(largest, float((x.float() - y.float()).abs().max()))
    extra = sorted(set(b.names) - set(a.names))
    shares = {"equal": equal / total, "within_one_rounding": close / total}
    return {**shares, "largest_difference": largest, **({"only_theirs": extra} if extra else {})}


def _ordinal(values: torch.Tensor) -> torch.Tensor:
    """bfloat16 as integers, such that neighbouring numbers are one apart."""
    bits = values.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


class Bench:
    """One set of inputs, a folder to work in, and where the rows go."""

    def __init__(self, folders: Sequence[Path], work: Path, lines: Sequence, **common):
        self.folders, self.work, self.rows = folders, work, []
        self._lines, self._common = lines, common

    def note(self, **row) -> dict:
        row = {"op": OP, **self._common, **row}
        for stream in self._lines:
            print(json.dumps(row), file=stream, flush=True)
        self.rows.append(row)
        return row

    def run(self, method: str, contender: Contender | None, **more) -> tuple[Cost, Path]:
        """Run one merge, or the floor for None; the caller removes the output."""
        name = "floor" if contender is None else contender.name
        out = self.work / f"out-{name}"
        shutil.rmtree(out, ignore_errors=True)
        settle()
        if contender is None:
            out.mkdir()
            target = out / "model.safetensors"
            cost = floor(inputs_of(method, self.folders), target, weights_of(self.folders[0]))
        else:
            recipe = self.work / f"{method}.yaml"
            recipe.write_text(recipe_of(method, self.folders))
            cost = measure(contender.command(recipe, out), cwd=ROOT)
        self.note(
            method=method,
            contender=name,
            wall_s=cost.wall_s,
            cpu_s=cost.cpu_s,
            user_s=cost.user_s,
            system_s=cost.system_s,
            peak_anonymous_bytes=cost.peak_anonymous_bytes,
            **more,
            **({"failed": cost.message} if cost.returncode else {}),
        )
        return cost, out

    def rounds(
        self, methods: Sequence[str], contenders: Sequence[Contender], rounds: int, compare: bool
    ) -> None:
        """Run floor and contenders in turn, ``rounds`` times over all ``methods``."""
        failed = set()
        for number in range(rounds):
            for contender in contenders:
                cost = contender.import_cost()
                self.note(
                    contender=contender.name,
                    round=number,
                    import_wall_s=cost.wall_s,
                    import_cpu_s=cost.cpu_s,
                )
            for method in methods:
                before, outs = harness.probes(), {}
                for contender in (None, *contenders):
                    if (method, contender) in failed:
                        continue
                    cost, out = self.run(method, contender, round=number)
                    outs[contender] = out
                    if cost.returncode:
                        failed.add((method, contender))
                self.note(
                    method=method, round=number, probes_before=before, probes_after=harness.probes()
                )
                both = [outs[c] for c in contenders if c in outs and (method, c) not in failed]
                if compare and number == 0 and len(both) == 2:
                    self.note(method=method, compared=differences(*both))
                for out in outs.values():
                    shutil.rmtree(out, ignore_errors=True)


def imports_of(rows: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Median wall and CPU time of each contender's imports."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        if "import_wall_s" in row:
            found.setdefault(row["contender"], []).append(row)
    return {
        name: {
            kind: statistics.median(r[f"import_{kind}_s"] for r in several)
            for kind in ("wall", "cpu")
        }
        for name, several in found.items()
    }


def summaries(rows: Sequence[dict]) -> Iterator[dict]:
    """One row per method and contender: medians, and ratios to the floor and to mergekit."""
    imports = imports_of(rows)
    runs: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if "wall_s" in row and "failed" not in row:
            runs.setdefault((row["method"], row["contender"]), []).append(row)
    median: dict[tuple[str, str], dict[str, float]] = {}
    for (method, name), found in runs.items():
        cost = {
            field: statistics.median(r[field] for r in found)
            for field in ("wall_s", "cpu_s", "peak_anonymous_bytes")
        }
        # Below a hundredth of a second a net time is noise, and so is a ratio to it.
        for kind in ("wall", "cpu"):
            start = imports[name][kind] if name in imports else 0.0
            cost[f"net_{kind}_s"] = max(0.01, cost[f"{kind}_s"] - start)
        median[method, name] = cost
    for (method, name), cost in median.items():
        row = {"method": method, "contender": name, **cost}
        if name != "floor":
            row["wall_to_floor"] = cost["wall_s"] / median[method, "floor"]["wall_s"]
            row["net_to_floor"] = cost["net_wall_s"] / median[method, "floor"]["wall_s"]
        if name == "ours" and (theirs := median.get((method, "mergekit"))):
            for field in ("wall", "cpu", "net_wall", "net_cpu"):
                row[f"mergekit_to_ours_{field}"] = theirs[f"{field}_s"] / cost[f"{field}_s"]
        yield row


def noise_of(rows: Sequence[dict]) -> dict[str, float]:
    """Largest over smallest value of each probe in the whole run."""
    probes = [
        row[when] for row in rows for when in ("probes_before", "probes_after") if when in row
    ]
    return {name: max(p[name] for p in probes) / min(p[name] for p in probes) for name in probes[0]}


def table_of(summary: Sequence[dict]) -> str:
    """The summary as text."""
    header = ["method", "contender", "wall s", "net s", "CPU s", "peak anon", "x floor"]
    header += ["net x floor", "mergekit / ours", "net", "CPU", "net CPU"]

    def ratio(row: dict, field: str) -> str:
        return f"{row[field]:.1f}" if field in row else ""

    rows, rules = [], []
    for row in summary:
        if rows and row["method"] != rows[-1][0] and row["contender"] == "floor":
            rules.append(len(rows))
        rows.append(
            [
                row["method"],
                row["contender"],
                f"{row['wall_s']:.2f}",
                f"{row['net_wall_s']:.2f}",
                f"{row['cpu_s']:.2f}",
                format_size(row["peak_anonymous_bytes"]) if row["contender"] != "floor" else "",
                ratio(row, "wall_to_floor"),
                ratio(row, "net_to_floor"),
                *(
                    ratio(row, f"mergekit_to_ours_{field}")
                    for field in ("wall", "net_wall", "cpu", "net_cpu")
                ),
            ]
        )
    return text_table(header, rows, rules=rules)


def plot(summary: Sequence[dict], file: Path, note: str) -> None:
    """Wall time as a multiple of the floor's, one group per method."""
    from mergeme_ext.report import grouped_bars

    methods = list(dict.fromkeys(row["method"] for row in summary))
    ratios = {(r["method"], r["contender"]): r.get("wall_to_floor") for r in summary}
    names = [n for n in ("ours", "mergekit") if any((m, n) in ratios for m in methods)]
    series = {n: [ratios.get((m, n)) or 0.0 for m in methods] for n in names}
    title = f"Wall time of a merge, imports included\n{note}"
    axis = "multiple of reading the inputs and writing the output"
    grouped_bars(file, series, methods, title=title, axis=axis, reference=1.0)


def memory_run(
    bench: Bench, methods: Sequence[str], ours: Contender, limit: int, size: str
) -> list[list[str]]:
    """Peak memory of our merges of models of ``size``; rows for a table."""
    rows = []
    for method in methods:
        cost, out = bench.run(method, ours, size=size, limit_bytes=limit + MEMORY_ALLOWANCE)
        shutil.rmtree(out, ignore_errors=True)
        peak = cost.peak_anonymous_bytes
        held = "failed" if cost.returncode else "yes" if peak <= limit + MEMORY_ALLOWANCE else "NO"
        rows.append([method, size, format_size(peak), format_size(limit + MEMORY_ALLOWANCE), held])
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--size", default="0.5GB", help="of each of the three models (default: %(default)s)")
    add(
        "--inputs",
        nargs=3,
        type=Path,
        metavar=("BASE", "A", "B"),
        help="models to merge instead of made ones",
    )
    add("--methods", default=None, help="comma-separated (default: all)")
    add("--rounds", type=int, default=3)
    add("--mergekit", metavar="PYTHON", help="interpreter of an environment with mergekit 0.1.5")
    add("--our-flag", action="append", default=[], help="for our command, as --our-flag=-j2")
    add("--mergekit-flag", action="append", default=[], help="for mergekit's")
    add("--max-memory", metavar="SIZE", help="for our command (with --memory: 1GiB)")
    add("--memory", action="store_true", help="peak memory of our merges at three sizes instead")
    add("--sizes", default=",".join(MEMORY_SIZES), help="for --memory (default: %(default)s)")
    add("--compare", action="store_true", help="compare the outputs of the first round too")
    add("--work", type=Path, help="folder for models and outputs (default: a temporary one)")
    add("--jsonl", type=Path, help="append every row to this file (default: standard output)")
    add("--plot", type=Path, metavar="PNG", help="draw the ratios to the floor")
    return parser


def _methods(text: str | None, default: Sequence[str]) -> list[str]:
    chosen = list(default) if text is None else text.split(",")
    for method in chosen:
        if method not in RECIPES:
            raise SystemExit(f"no recipe for {method!r}; there are {', '.join(RECIPES)}")
    return chosen


def main(arguments: Sequence[str] | None = None) -> list[dict]:
    """Run the bench; return all rows."""
    options = _parser().parse_args(arguments)
    max_memory = options.max_memory or ("1GiB" if options.memory else None)
    ours = Contender(
        "ours",
        (sys.executable, "-m", "mergeme_ext", "merge"),
        (*(["--max-memory", max_memory] if max_memory else []), *options.our_flag),
    )
    contenders = [ours]
    if options.mergekit:
        start = (options.mergekit, "-m", "mergekit.scripts.run_yaml")
        contenders.append(Contender("mergekit", start, tuple(options.mergekit_flag)))
    if options.work is not None:
        Path(options.work).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work, prefix="bench-merge-") as temporary:
        work = Path(temporary)
        stream = options.jsonl.open("a") if options.jsonl else sys.stdout
        try:
            if options.memory:
                return _memory(options, ours, work, stream)
            return _timing(options, contenders, work, stream)
        finally:
            if options.jsonl:
                stream.close()


def _timing(options, contenders: Sequence[Contender], work: Path, stream) -> list[dict]:
    methods = _methods(options.methods, list(RECIPES))
    folders = options.inputs or make_checkpoints(work, parse_size(options.size), ["a", "b"])
    folders = [path.resolve() for path in folders]
    common = {"model_bytes": weights_of(folders[0]), "torch": torch.__version__}
    bench = Bench(folders, work, [stream], **common)
    for folder in folders:  # into the page cache, for the first contender as for the others
        floor(sorted(folder.glob("*.safetensors")), work / "warm", 1)
    os.sync()  # else the disk is still busy with the models while the first merge runs
    bench.rounds(methods, contenders, options.rounds, options.compare)
    noise = noise_of(bench.rows)
    summary = list(summaries(bench.rows))
    for row in summary:
        bench.note(summary=row)
    print(table_of(summary))
    imported = ", ".join(f"{name} {c['wall']:.2f} s" for name, c in imports_of(bench.rows).items())
    print(f"imports: {imported}; models of {format_size(weights_of(folders[0]))}")
    spread = ", ".join(f"{name} {ratio:.2f}" for name, ratio in noise.items())
    quiet = max(noise.values()) <= NOISE
    verdict = "quiet" if quiet else "NOISY: something else was running"
    print(f"probes, largest / smallest: {spread} ({verdict})")
    for row in bench.rows:
        if "failed" in row:
            print(f"failed: {row['method']} by {row['contender']}: {row['failed']}")
        if "compared" in row:
            print(f"outputs of {row['method']}: {row['compared']}")
    if options.plot:
        size = format_size(weights_of(folders[0]))
        plot(summary, options.plot, f"models of {size}, {'quiet' if quiet else 'noisy'} machine")
    return bench.rows


def _memory(options, ours: Contender, work: Path, stream) -> list[dict]:
    methods = _methods(options.methods, MEMORY_METHODS.split(","))
    limit = parse_size(options.max_memory or "1GiB")
    rows, table = [], []
    for size in options.sizes.split(","):
        folders = make_checkpoints(work / size, parse_size(size), ["a", "b"])
        bench = Bench(folders, work, [stream], model_bytes=weights_of(folders[0]))
        table += memory_run(bench, methods, ours, limit, size)
        rows += bench.rows
        shutil.rmtree(work / size)
    print(text_table(["method", "size", "peak anonymous", "limit", "held"], table))
    return rows


if __name__ == "__main__":
    main()

"""Makes the tables and the plot of bench_experts and bench_moe_model from their JSON lines.

python -m benchmarks.report_experts rows.jsonl --readme benchmarks/README.md --plot experts.svg
"""

import argparse
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import bench_experts, bench_moe_model
from benchmarks.experts_contenders import CONTENDERS, OURS
from benchmarks.moe_cases import SHAPES
from mergeme_ext.report.svg import line_chart

BEGIN, END = "<!-- report_experts: begin -->", "<!-- report_experts: end -->"
GROUP = ("shape", "dtype", "threads", "mode", "routing")
TITLES = {
    "packed_experts": "packed_experts (ours)",
    "grouped_experts": "grouped_experts (ours)",
    "torch_grouped_mm": "torch grouped_mm",
    "transformers_eager": "transformers eager",
    "transformers_grouped_mm": "transformers grouped_mm",
    "transformers_batched_mm": "transformers batched_mm",
    "vllm": "vLLM",
    "sglang": "SGLang",
    "kt_kernel": "kt-kernel",
}


def groups_of(rows: Sequence[dict]) -> dict[tuple, dict[int, dict[str, dict]]]:
    """Rows by group, by number of tokens, by contender; of a case run twice the last run counts."""
    found: dict[tuple, dict[int, dict[str, dict]]] = {}
    for row in rows:
        if row.get("op") == bench_experts.OP:
            group = found.setdefault(tuple(row[key] for key in GROUP), {})
            group.setdefault(row["tokens"], {})[row["contender"]] = row
    return found


def ours_of(case: dict[str, dict]) -> dict | None:
    """The faster of our two rows; None if neither ran."""
    ran = [case[name] for name in OURS if "best_s" in case.get(name, {})]
    return min(ran, key=lambda row: row["best_s"]) if ran else None


def fastest_peer(case: dict[str, dict]) -> dict | None:
    """The fastest row that is not ours."""
    ran = [row for name, row in case.items() if name not in OURS and "best_s" in row]
    return min(ran, key=lambda row: row["best_s"]) if ran else None


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for cells in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(cells)} |"


def group_table(group: tuple, cases: dict[int, dict[str, dict]]) -> Iterator[str]:
    """Title, table and the reasons of what is missing, as Markdown."""
    shape, dtype, threads, mode, routing = group
    sizes = SHAPES[shape]
    yield (
        f"**{shape}** (E={sizes.experts} H={sizes.hidden} I={sizes.intermediate} "
        f"K={sizes.top_k}), {dtype}, {mode}, {routing} routing, "
        f"{threads} thread{'s' if threads > 1 else ''}; milliseconds"
    )
    yield ""
    names = [n for n in CONTENDERS if any("best_s" in c.get(n, {}) for c in cases.values())]
    header = ["tokens", *(TITLES[n] for n in names)]
    header += ["floor: bytes", "flops", "ours x floor", "fastest peer / ours"]
    table, reasons = [], {}
    for tokens in sorted(cases):
        case = cases[tokens]
        any_row = next(iter(case.values()))
        cells = [f"{tokens}{' (noisy)' if any_row['noisy'] else ''}"]
        cells += [_ms(case[n]["best_s"]) if "best_s" in case.get(n, {}) else "" for n in names]
        cells += [_ms(any_row["floor_bytes_s"]), _ms(any_row["floor_flops_s"])]
        ours, peer = ours_of(case), fastest_peer(case)
        cells.append(f"{ours['x_floor']:.2f}" if ours else "")
        both = ours and peer
        cells.append(
            f"{peer['best_s'] / ours['best_s']:.2f} ({TITLES[peer['contender']]})" if both else ""
        )
        table.append(cells)
        for name, row in case.items():
            if "missing" in row:
                reasons.setdefault((name, _bare(row["missing"])), []).append(tokens)
    yield from _table(header, table)
    if reasons:
        yield ""
        yield "Missing: " + "; ".join(
            f"{TITLES[name]}{_at(counts, cases)}: {reason}"
            for (name, reason), counts in reasons.items()
        )
    yield ""


def _bare(reason: str) -> str:
    """A reason without the numbers that differ from case to case."""
    reason = re.sub(r"about \d+ s a call", "too slow a call", reason)
    reason = re.sub(r" at \d+ tokens", "", reason)
    return re.sub(r"make \d+ GiB", "make gigabytes", reason)


def _at(counts: Sequence[int], cases: dict) -> str:
    return "" if len(counts) == len(cases) else f" from {min(counts)} tokens"


def model_table(rows: Sequence[dict]) -> Iterator[str]:
    """The whole models: last run of each."""
    last = {}
    for row in rows:
        if row.get("op") == bench_moe_model.OP and "phase" in row:
            key = [row[k] for k in ("model", "threads", "phase", "implementation")]
            last[tuple(key)] = row
    if not last:
        return
    yield "**Whole models** of transformers, bfloat16"
    yield ""
    yield from _table(bench_moe_model.HEADER, list(bench_moe_model.table_of(list(last.values()))))
    yield ""
    checks = {(r["model"], r["check"]): r for r in rows if "check" in r and "model" in r}
    for (model, name), row in checks.items():
        if name != row["against"]:
            ids = "the same" if row["greedy_ids_agree"] else "DIFFERENT"
            yield (
                f"- {model}, `{name}`: bfloat16 logits {row['bfloat16_error']:.2g} from float32 "
                f"({'within' if row['logits_agree'] else 'BEYOND'} twice `{row['against']}`'s); "
                f"float32 {row['float32_difference']:.2g} from it, greedy tokens {ids}"
            )
    peaks = {
        (r["model"], r["implementation"]): r["peak_resident_bytes"]
        for r in rows
        if r.get("peak_resident_bytes")
    }
    for (model, name), peak in peaks.items():
        yield f"- {model}, `{name}`: peak of {peak / 1e9:.2f} GB resident, the weights included"
    yield ""


def report(rows: Sequence[dict]) -> str:
    """All tables as Markdown."""
    lines = []
    machine = sorted({(r["cpu"], r["torch"]) for r in rows if "cpu" in r})
    for cpu, torch_version in machine:
        lines.append(f"Measured on {cpu}, torch {torch_version}.")
    probes = [r[w] for r in rows for w in ("probes_before", "probes_after") if w in r]
    if probes:
        names = dict.fromkeys(name for p in probes for name in p)
        spread = ", ".join(
            f"{n} {min(p[n] for p in probes if n in p):.3g} to "
            f"{max(p[n] for p in probes if n in p):.3g}"
            for n in names
        )
        lines.append(f"Probes over all cases and thread counts: {spread}.")
    lines.append("")
    for group, cases in groups_of(rows).items():
        lines += group_table(group, cases)
    lines += model_table(rows)
    return "\n".join(lines).strip() + "\n"


def into_readme(path: Path, text: str) -> None:
    """Put ``text`` between the two marks in ``path``.

    Raises:
        ValueError: The file has not both marks.
    """
    old = path.read_text()
    if BEGIN not in old or END not in old:
        raise ValueError(f"{path}: expected the lines {BEGIN} and {END}")
    head, rest = old.split(BEGIN, 1)
    path.write_text(f"{head}{BEGIN}\n\n{text}\n{END}{rest.split(END, 1)[1]}")


STYLE = """
svg { font: 12px system-ui, sans-serif } text { fill: #59636e } text.axis { fill: #1b1f24 }
.grid { stroke: #d8dee4; fill: none } .line { fill: none; stroke-width: 1.8 }
.reference { stroke: #59636e; stroke-dasharray: 4 4; fill: none } circle { stroke: none }
"""
COLOURS = ("#0072b2", "#d55e00", "#008a63", "#b3508a", "#7a6a00", "#3c8fc4", "#8a4b08", "#555555")
PANEL = (620, 300)


def plot(rows: Sequence[dict]) -> str:
    """One drawing: per group a panel of the multiples of the floor over the number of tokens."""
    groups = groups_of(rows)
    names = [n for n in CONTENDERS if any(_ran(n, cases) for cases in groups.values())]
    # The styles of svg.py are eight; the ninth contender is told by its dashes.
    style = {name: number for number, name in enumerate(names)}
    columns = 1 if len(groups) == 1 else 2
    width, height = PANEL
    in_row = 3 * columns
    top = 26 + 20 * math.ceil(len(names) / in_row)
    total = top + (height + 30) * math.ceil(len(groups) / columns)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width * columns} {total}">'
        f"<style>{STYLE}{_colours()}</style>"
        f'<rect width="{width * columns}" height="{total}" fill="#fff"/>'
    ]
    for number, name in enumerate(names):
        x, y = 16 + 204 * (number % in_row), 22 + 20 * (number // in_row)
        dash = ' stroke-dasharray="6 3"' if style[name] >= len(COLOURS) else ""
        out.append(
            f'<g class="s{style[name] % len(COLOURS)}"{dash}>'
            f'<path class="line" d="M{x} {y - 4}H{x + 26}"/></g>'
            f'<text x="{x + 32}" y="{y}">{TITLES[name]}</text>'
        )
    for number, (group, cases) in enumerate(groups.items()):
        x, y = width * (number % columns), top + (height + 30) * (number // columns)
        title = "{} {} {} threads {} {}".format(*group)
        out.append(f'<text class="axis" x="{x + 60}" y="{y + 14}">{title}</text>')
        here = [n for n in names if _ran(n, cases)]
        if not here:
            continue
        series = {TITLES[n]: [_log_floors(cases[t].get(n)) for t in sorted(cases)] for n in here}
        chart = line_chart(
            title,
            [str(t) for t in sorted(cases)],
            series,
            x_axis="tokens",
            y_axis="multiple of the floor, logarithmic",
            form=lambda v: f"{2**v:.3g}",
            reference=(0.0, "floor"),
            styles=[style[n] for n in here],
            width=width,
            height=height,
        )
        place = f'<svg x="{x}" y="{y + 20}" width="{width}" height="{height}" '
        out.append(chart.replace("<svg ", place, 1))
    return "".join(out) + "</svg>\n"


def _ran(name: str, cases: dict[int, dict[str, dict]]) -> bool:
    return any("best_s" in case.get(name, {}) for case in cases.values())


def _log_floors(row: dict | None) -> float:
    return math.log2(row["x_floor"]) if row and "x_floor" in row else math.nan


def _colours() -> str:
    return "".join(
        f".s{i} .line {{ stroke: {c} }} .s{i} circle {{ fill: {c} }}" for i, c in enumerate(COLOURS)
    )


def main(arguments: Sequence[str] | None = None) -> str:
    """Write what is asked for; return the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jsonl", type=Path, nargs="+")
    parser.add_argument("--readme", type=Path, help="put the tables between this file's marks")
    parser.add_argument("--plot", type=Path, metavar="SVG")
    options = parser.parse_args(arguments)
    rows = [json.loads(line) for path in options.jsonl for line in path.read_text().splitlines()]
    text = report(rows)
    if options.plot and options.readme:
        place = os.path.relpath(options.plot, options.readme.parent)
        text = f"![Multiples of the floor over the number of tokens]({place})\n\n{text}"
    if options.readme:
        into_readme(options.readme, text)
    else:
        print(text)
    if options.plot:
        options.plot.write_text(plot(rows))
    return text


if __name__ == "__main__":
    main()

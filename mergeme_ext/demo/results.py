"""What the demo found, as numbers, as a table, as sentences and as a chart."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergeme_ext.demo.models import Made
from mergeme_ext.demo.settings import DOMAINS, EXPERT_DOMAINS, ROUTERS
from mergeme_ext.report import grouped_bars, text_table

__all__ = ["Result", "best_moe", "chart", "document", "findings", "table"]

AVERAGE = "med + code"


@dataclass(frozen=True)
class Result:
    """One model's perplexity in each domain."""

    model: Made
    perplexity: Mapping[str, float]

    @property
    def average(self) -> float:
        """Geometric mean over the experts' domains: exp of the mean loss."""
        logs = [math.log(self.perplexity[domain]) for domain in EXPERT_DOMAINS]
        return math.exp(sum(logs) / len(logs))


def _columns(result: Result) -> list[float]:
    return [*(result.perplexity[domain] for domain in DOMAINS), result.average]


def _group_starts(results: Sequence[Result]) -> list[int]:
    kinds = [(r.model.kind in ("base", "expert"), r.model.kind, r.model.router) for r in results]
    groups = ["single" if kind[0] else kind[1:] for kind in kinds]
    return [i for i in range(1, len(groups)) if groups[i] != groups[i - 1]]


def table(results: Sequence[Result]) -> str:
    """Return the table: a row per model, a column per domain, a star on each column's least."""
    columns = list(zip(*map(_columns, results), strict=True))
    marked = {(column.index(min(column)), c + 1) for c, column in enumerate(columns)}
    rows = [[r.model.label, *(f"{value:.2f}" for value in _columns(r))] for r in results]
    return text_table(
        ["held-out perplexity", *DOMAINS, AVERAGE],
        rows,
        marked=marked,
        rules=_group_starts(results),
    )


def best_moe(results: Sequence[Result]) -> Result:
    """Return the MoE with the least average."""
    return min((r for r in results if r.model.kind == "moe"), key=lambda r: r.average)


def findings(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return what the table shows of the claims it is there for: a text, and whether it holds."""
    out = []
    experts = {r.model.domain: r for r in results if r.model.kind == "expert"}
    single = [r for r in results if r.model.kind in ("base", "expert")]
    for domain, expert in experts.items():
        others = [r.perplexity[domain] for r in single if r is not expert]
        own = expert.perplexity[domain]
        out.append(
            {
                "text": f"{expert.model.label} at home in {domain}: {own:.2f} against "
                f"{min(others):.2f} for the better of base and other expert",
                "holds": own < min(others),
            }
        )
    dense = {r.model.method: r for r in results if r.model.kind == "dense"}
    for router in ROUTERS:
        for moe in results:
            if moe.model.kind == "moe" and moe.model.router == router:
                rival = dense[moe.model.method]
                out.append(
                    {
                        "text": f"{moe.model.label} against {rival.model.label} on {AVERAGE}: "
                        f"{moe.average:.2f} against {rival.average:.2f}",
                        "holds": moe.average < rival.average,
                    }
                )
    return out


def chart(results: Sequence[Result], file: Path) -> Path:
    """Draw each model's perplexity relative to the base's to the PNG ``file``."""
    base = next(r for r in results if r.model.kind == "base")
    shown = [r for r in results if r is not base]
    series = {
        domain: [100 * (r.perplexity[domain] / base.perplexity[domain] - 1) for r in shown]
        for domain in DOMAINS
    }
    starts = [i - 1 for i in _group_starts(results) if i > 1]
    return grouped_bars(
        file,
        series,
        [r.model.label for r in shown],
        title="Held-out perplexity against the base model (further left is better)",
        axis="change of perplexity, %",
        reference=0.0,
        separators=starts,
        form="%+.1f",
    )


def document(
    results: Sequence[Result], settings: Mapping[str, Any], samples: Any
) -> dict[str, Any]:
    """Return everything as plain data, for JSON."""
    rows = [
        {
            "label": r.model.label,
            "kind": r.model.kind,
            "method": r.model.method,
            "router": r.model.router,
            "perplexity": {d: round(p, 4) for d, p in r.perplexity.items()},
            "average_of_expert_domains": round(r.average, 4),
            "checkpoint": str(r.model.folder),
        }
        for r in results
    ]
    return {
        "settings": dict(settings),
        "results": rows,
        "findings": findings(results),
        "samples": samples,
    }

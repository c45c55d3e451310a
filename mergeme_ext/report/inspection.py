"""What an inspection found, as a text for the terminal and as a page."""

import math
from collections.abc import Sequence
from html import escape

from mergeme_ext._version import __version__
from mergeme_ext.inspection import Figures, Inspection, StandOut
from mergeme_ext.inspection.spectra import METHOD
from mergeme_ext.report.page import details, figure, html_page, html_table
from mergeme_ext.report.svg import heat_map, legend, line_chart
from mergeme_ext.report.table import text_table

__all__ = ["inspection_page", "inspection_text"]

# With more models than these, columns and lines hold the extremes instead of one per model.
MANY_MODELS, MANY_LINES = 3, 8


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.3g}" if abs(value) < 0.1 else f"{value:.3f}"


def _cosine(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


def _percent(value: float) -> str:
    """Return a share with three significant digits."""
    if not math.isfinite(value):
        return "-"
    return f"{100 * value:#.3g}".rstrip(".") + " %" if value else "0 %"


def _count(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _pair_name(inspection: Inspection, pair: tuple[int, int], *, short: bool) -> str:
    if short:
        return f"{pair[0] + 1}·{pair[1] + 1}"
    return f"{inspection.models[pair[0]]} and {inspection.models[pair[1]]}"


def _what(inspection: Inspection) -> str:
    return "weights" if inspection.base is None else "task vectors"


def _extremes(values: Sequence[float]) -> list[float]:
    finite = [v for v in values if math.isfinite(v)]
    return [min(finite), max(finite)] if finite else [math.nan, math.nan]


def _columns(inspection: Inspection) -> list[str]:
    """Return the titles of what ``_cells`` gives."""
    many = len(inspection.models) > MANY_MODELS
    numbers = ["min", "max"] if many else [str(m + 1) for m in range(len(inspection.models))]
    pairs = [_pair_name(inspection, pair, short=True) for pair in inspection.pairs]
    out = [f"cosine {n}" for n in (["min", "max"] if many else pairs)]
    if inspection.pairs:
        out.append("sign conflict")
    if inspection.base is not None:
        out += [f"|d|/|base| {n}" for n in numbers]
    out += [f"{'zero' if inspection.base is None else 'unchanged'} {n}" for n in numbers]
    return out


def _cells(inspection: Inspection, figures: Figures) -> list[str]:
    many = len(inspection.models) > MANY_MODELS

    def shown(values: Sequence[float]) -> Sequence[float]:
        return _extremes(values) if many else values

    out = [_cosine(v) for v in shown(figures.cosine)]
    if inspection.pairs:
        out.append(_percent(figures.sign_conflict))
    if inspection.base is not None:
        out += [_percent(v) for v in shown(figures.relative_norm)]
    return out + [_percent(v) for v in shown(figures.unchanged)]


def _kind_table(inspection: Inspection) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: module kinds, then all together."""
    spectra = {
        kind: [s.stable_rank for s in inspection.spectra if s.kind == kind]
        for kind in inspection.kinds
    }
    header = ["module kind", "tensors", "weights", *_columns(inspection)]
    header += ["stable rank"] if inspection.spectra else []
    rows = []
    for kind, figures in inspection.by_kind.items():
        number = sum(t.kind == kind for t in inspection.tensors)
        row = [kind, str(number), _count(figures.numel), *_cells(inspection, figures)]
        if inspection.spectra:
            ranks = [r for r in spectra[kind] if math.isfinite(r)]
            row.append(f"{sum(ranks) / len(ranks):.1f}" if ranks else "-")
        rows.append(row)
    whole = [str(len(inspection.tensors)), _count(inspection.total.numel)]
    row = ["all", *whole, *_cells(inspection, inspection.total)]
    rows.append(row + ["" for _ in header[len(row) :]])
    return header, rows


def _pair_table(inspection: Inspection) -> tuple[list[str], list[list[str]]]:
    """Return the cosine of every pair over the whole models."""
    cosines = dict(zip(inspection.pairs, inspection.total.cosine, strict=True))
    numbers = range(len(inspection.models))
    rows = []
    for i in numbers:
        cells = [
            "1" if i == j else _cosine(cosines[min(i, j), max(i, j)]) for j in numbers if j <= i
        ]
        name = f"{i + 1} {inspection.models[i]}"
        rows.append([name, *cells, *[""] * (len(inspection.models) - len(cells))])
    return ["cosine", *[str(j + 1) for j in numbers]], rows


def _stand_out_row(inspection: Inspection, found: StandOut) -> list[str]:
    if found.figure == "cosine":
        what, form = (
            f"cosine {_pair_name(inspection, inspection.pairs[found.of], short=True)}",
            _cosine,
        )
    elif found.figure == "sign_conflict":
        what, form = "sign conflict", _percent
    else:
        what, form = f"|d|/|base| {found.of + 1}", _percent
    far = f"{found.distance:.1f}"
    return [f"layer {found.layer}", what, form(found.value), form(found.median), far]


_STAND_OUT_HEADER = ["layer", "figure", "value", "median layer", "deviations"]


def _warnings(inspection: Inspection) -> list[str]:
    out = []
    labels = [inspection.base, *inspection.models]
    for number, (label, count) in enumerate(zip(labels, inspection.total.non_finite, strict=True)):
        if count:
            holding = (t.name for t in inspection.tensors if t.figures.non_finite[number])
            out.append(
                f"{label} holds {_count(count)} NaN or infinite weights, the first of them in "
                f"{next(holding)}; those positions are left out of every figure"
            )
    for name, reason in inspection.left_out.items():
        out.append(f"{name} is not compared: {reason}")
    return out


def inspection_text(inspection: Inspection) -> str:
    """Return tables for the terminal: module kinds, pairs, and the layers that stand out."""
    legend_lines = [f"{m + 1}  {name}" for m, name in enumerate(inspection.models)]
    base = inspection.base
    head = f"task vectors against {base}" if base is not None else "no base: the weights themselves"
    header, rows = _kind_table(inspection)
    parts = ["\n".join([head, *legend_lines]), text_table(header, rows, rules=[len(rows) - 1])]
    if len(inspection.models) > 2:
        parts.append(text_table(*_pair_table(inspection)))
    if inspection.stand_outs:
        found = [_stand_out_row(inspection, s) for s in inspection.stand_outs[:12]]
        more = len(inspection.stand_outs) - len(found)
        parts.append(
            "layers that stand out, farthest first\n"
            + text_table(_STAND_OUT_HEADER, found)
            + (f"\nand {more} more in the JSON and the page" if more else "")
        )
    elif len(inspection.layers) >= 4:
        parts.append("no layer stands out")
    parts += [f"note: {warning}" for warning in _warnings(inspection)]
    # Names come from files of others; none shall steer the terminal.
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in "\n\n".join(parts))


def _summary(inspection: Inspection) -> list[str]:
    """Return sentences on the whole models."""
    total, what = inspection.total, _what(inspection)
    out = []
    for pair, cosine in list(zip(inspection.pairs, total.cosine, strict=True))[:3]:
        names = _pair_name(inspection, pair, short=False)
        out.append(f"The {what} of {names} have a cosine of {_cosine(cosine)}.")
    if inspection.pairs:
        chance = 1 - 2.0 ** (1 - len(inspection.models))
        share = total.contested / total.usable if total.usable else math.nan
        out.append(
            f"At {_percent(share)} of the positions at least two models "
            f"{'are not zero' if inspection.base is None else 'moved'}; at "
            f"{_percent(total.sign_conflict)} of these they disagree in sign"
            f" (by chance alone it would be {_percent(chance)}, if all of them moved)."
        )
    if inspection.base is not None:
        for model, norm, unchanged in zip(
            inspection.models, total.relative_norm, total.unchanged, strict=True
        ):
            out.append(
                f"{model} differs from {inspection.base} at {_percent(1 - unchanged)} of the "
                f"weights; its task vector's norm is {_percent(norm)} of the base's."
            )
    return out


def _lines(inspection: Inspection, figure_name: str) -> dict[str, list[float]]:
    """Return a series over the layers per pair or model, or of the extremes if there are many."""
    rows = [getattr(f, figure_name) for f in inspection.by_layer.values()]
    if figure_name == "cosine":
        names = [_pair_name(inspection, pair, short=False) for pair in inspection.pairs]
    else:
        names = list(inspection.models)
    if len(names) > MANY_LINES:
        finite = [[v for v in row if math.isfinite(v)] or [math.nan] for row in rows]
        return {
            "lowest": [min(row) for row in finite],
            "mean": [sum(row) / len(row) for row in finite],
            "highest": [max(row) for row in finite],
        }
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def _layer_chart(inspection: Inspection, figure_name: str, heading: str, **options) -> str:
    labels = [str(layer) for layer in inspection.layers]
    series = _lines(inspection, figure_name)
    chart = line_chart(heading, labels, series, x_axis="layer", **options)
    form = options["form"]
    rows = [
        [label, *[form(v) if math.isfinite(v) else "-" for v in values]]
        for label, *values in zip(labels, *series.values(), strict=True)
    ]
    table = details("The values as a table", html_table(["layer", *series], rows))
    return legend(list(series)) + chart + table


def _conflict_map(inspection: Inspection) -> str:
    rows = [
        k for k in inspection.kinds if any(kind == k for _, kind in inspection.by_layer_and_kind)
    ]
    values = {
        (rows.index(kind), inspection.layers.index(layer)): figures.sign_conflict
        for (layer, kind), figures in inspection.by_layer_and_kind.items()
    }
    columns = [str(layer) for layer in inspection.layers]
    chart = heat_map(
        "Sign conflict by layer and module kind",
        rows,
        columns,
        values,
        x_axis="layer",
        value_name="sign conflict",
        form=_percent,
        scale=_scale_of(inspection),
    )
    cells = [
        [row, *[_percent(values.get((r, c), math.nan)) for c in range(len(columns))]]
        for r, row in enumerate(rows)
    ]
    return chart + details("The values as a table", html_table(["module kind", *columns], cells))


def _scale_of(inspection: Inspection) -> tuple[float, float] | None:
    """Return the range of the larger cells: a norm's few weights scatter, and would fill it."""
    cells = inspection.by_layer_and_kind.values()
    enough = max((f.contested for f in cells), default=0) / 100
    values = [f.sign_conflict for f in cells if f.contested >= max(1, enough)]
    return (min(values), max(values)) if values else None


def _spectrum_panels(inspection: Inspection) -> str:
    largest = max(
        (s.singular_values[0] / s.norm for s in inspection.spectra if s.norm > 0), default=1.0
    )
    panels = []
    for kind in inspection.kinds:
        found = [s for s in inspection.spectra if s.kind == kind and s.norm > 0]
        if not found:
            continue
        longest = max(len(s.singular_values) for s in found)
        series = {
            f"{inspection.models[s.model]}, {s.tensor}": [
                *(v / s.norm for v in s.singular_values),
                *[math.nan] * (longest - len(s.singular_values)),
            ]
            for s in found
        }
        chart = line_chart(
            f"Spectrum of {kind}",
            [str(i + 1) for i in range(longest)],
            series,
            x_axis="singular value",
            y_axis="share of the norm",
            form="{:.2g}".format,
            y_range=(0.0, largest),
            styles=[s.model for s in found],
            width=330,
            height=220,
        )
        panels.append(f"<div>{_heading(kind, 3)}{chart}</div>")
    rows = [
        [
            s.tensor,
            inspection.models[s.model],
            f"{s.stable_rank:.1f}" if math.isfinite(s.stable_rank) else "-",
            _percent(s.energy),
            *[_number(v) for v in s.singular_values],
        ]
        for s in inspection.spectra
    ]
    longest = max(len(s.singular_values) for s in inspection.spectra)
    rows = [row + [""] * (4 + longest - len(row)) for row in rows]
    header = ["tensor", "model", "stable rank", "energy of these"]
    header += [f"sigma {i + 1}" for i in range(longest)]
    table = details("The values as a table", html_table(header, rows))
    styles = legend(list(inspection.models))
    return f'{styles}<div class="panels">{"".join(panels)}</div>{table}'


def _heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def inspection_page(inspection: Inspection) -> str:
    """Return one HTML page with tables and drawings, which opens without network."""
    what = _what(inspection)
    base = inspection.base
    title = f"Before the merge: {', '.join(inspection.models)}"
    size = f"{_count(inspection.total.numel)} weights in {len(inspection.tensors)} tensors"
    against = f"compared with {base}" if base is not None else "without a base"
    body = [f'<p class="soft">{escape(f"{against}; {size}; mergeme_ext {__version__}")}</p>']
    body += [f'<p class="warning">{escape(w)}</p>' for w in _warnings(inspection)]
    body.append("<ul>" + "".join(f"<li>{escape(s)}</li>" for s in _summary(inspection)) + "</ul>")
    numbered = "; ".join(f"{m + 1} is {name}" for m, name in enumerate(inspection.models))
    header, rows = _kind_table(inspection)
    body += [
        _heading("By module kind"),
        f'<p class="soft">{escape(numbered)}.</p>',
        html_table(header, rows, rules=[len(rows) - 1]),
    ]
    if len(inspection.models) > 2:
        body += [_heading("Every pair"), html_table(*_pair_table(inspection))]
    if inspection.layers:
        body += _layer_sections(inspection, what)
    if inspection.spectra:
        shape = "weights" if base is None else "task vectors"
        body += [
            _heading("Spectra"),
            figure(
                _spectrum_panels(inspection),
                f"The largest singular values of the {shape}, as shares of the matrix's norm, for "
                f"up to {inspection.samples} matrices of each kind (seed {inspection.seed}). A "
                "steep start means that a few directions hold most of the change, so that a "
                "low-rank adapter could carry it; a flat line means that it is spread. "
                f"Method: {METHOD}.",
            ),
        ]
    return html_page(title, body)


def _layer_sections(inspection: Inspection, what: str) -> list[str]:
    out = []
    if inspection.pairs:
        cosine = _layer_chart(
            inspection,
            "cosine",
            f"Cosine between {what} by layer",
            y_axis="cosine",
            form=_cosine,
            reference=(0.0, "unrelated") if inspection.base is not None else None,
        )
        out += [
            _heading(f"Cosine between {what}"),
            figure(
                cosine,
                "1: the same direction; 0: unrelated, so that adding the task vectors disturbs "
                "neither on average, and averaging M of them shrinks each to 1/M; below 0: they "
                "undo each other."
                if inspection.base is not None
                else "Weights of fine-tuned models are nearly the same direction; give the base to "
                "see how their changes relate.",
            ),
        ]
    if inspection.base is not None:
        norms = _layer_chart(
            inspection,
            "relative_norm",
            "Relative norm of the task vectors by layer",
            y_axis="norm of task vector / norm of base",
            form=_percent,
        )
        out += [
            _heading("How far each layer moved"),
            figure(
                norms,
                "Norm of the task vector as a share of the base's norm. A model that moved much "
                "farther than the others dominates an unweighted merge.",
            ),
        ]
    if inspection.pairs:
        out += [
            _heading("Sign conflict"),
            figure(
                _conflict_map(inspection),
                "Share of the positions moved by at least two models at which they moved in "
                "opposite directions. Methods that elect signs, such as TIES, drop the minority "
                "there. The colours span the larger cells; norms have few weights and scatter.",
            ),
        ]
    if inspection.stand_outs:
        rows = [_stand_out_row(inspection, s) for s in inspection.stand_outs]
        out += [
            _heading("Layers that stand out"),
            html_table(_STAND_OUT_HEADER, rows),
            '<p class="soft">Deviations are distances from the median layer in robust standard '
            "deviations (1.4826 times the median distance).</p>",
        ]
    return out

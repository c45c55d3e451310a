"""Line charts and heat maps as SVG text; the colours are the page's (``report.page``)."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

__all__ = ["SERIES_STYLES", "heat_map", "legend", "line_chart"]

# Series differ by colour and, beyond these, by dashes too.
SERIES_STYLES = 8
_DASHES = ("", "6 3", "2 3", "8 3 2 3")


def _place(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _open(width: float, height: float, title: str, description: str) -> str:
    label = escape(f"{title}: {description}")
    return (
        f'<svg viewBox="0 0 {_place(width)} {_place(height)}" role="img" aria-label="{label}" '
        'xmlns="http://www.w3.org/2000/svg">'
    )


def _text(x: float, y: float, text: str, *, anchor: str = "middle", extra: str = "") -> str:
    place = f'x="{_place(x)}" y="{_place(y)}" text-anchor="{anchor}"'
    return f"<text {place}{extra}>{escape(text)}</text>"


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return round numbers, about ``wanted`` of them, from at most ``low`` to at least ``high``."""
    raw = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _y_range(
    values: Sequence[float], include: Sequence[float], given: tuple[float, float] | None
) -> list[float]:
    if given is not None:
        return _ticks(*given)
    every = [*values, *include]
    low, high = min(every, default=0.0), max(every, default=1.0)
    if high - low < 1e-12 * max(abs(high), abs(low), 1e-300):
        gap = abs(high) / 2 or 0.5
        low, high = low - gap, high + gap
    return _ticks(low, high)


def _x_labels(labels: Sequence[str], room: float) -> list[int]:
    """Return which of ``labels`` to write so that they do not touch."""
    widest = max((len(label) for label in labels), default=1) * 7 + 8
    step = 1
    while len(labels) / step * widest > room:
        step += 1
        while step > 4 and step % 5:
            step += 1
    return list(range(0, len(labels), step))


def line_chart(
    title: str,
    x_labels: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    x_axis: str,
    y_axis: str,
    form: Callable[[float], str] = "{:.3g}".format,
    reference: tuple[float, str] | None = None,
    y_range: tuple[float, float] | None = None,
    styles: Sequence[int] | None = None,
    width: int = 760,
    height: int = 300,
) -> str:
    """Return an SVG with one line per series over ``x_labels``.

    Args:
        title: For screen readers; the page writes its own heading.
        x_labels: Names of the places on x.
        series: Name to one value per place; NaN leaves a gap.
        x_axis: What the places are.
        y_axis: What the values are, with the unit.
        form: How values are written.
        reference: A value to draw a dashed line at, and what it is called.
        y_range: Lowest and highest value of the axis; from the values if left out.
        styles: Number of the style of each series, so that several may share one.
        width: Of the drawing, in its own units.
        height: Likewise.

    Raises:
        ValueError: A series has another number of values than there are places.
    """
    for name, values in series.items():
        if len(values) != len(x_labels):
            raise ValueError(f"{name}: expected {len(x_labels)} values, got {len(values)}")
    finite = [v for values in series.values() for v in values if math.isfinite(v)]
    ticks = _y_range(finite, [] if reference is None else [reference[0]], y_range)
    tick_texts = [form(t) for t in ticks]
    left, right, top, bottom = 34 + 7 * max(map(len, tick_texts)), 14, 14, 46
    span_x, span_y = width - left - right, height - top - bottom

    def x_at(i: int) -> float:
        return left + span_x * (i / (len(x_labels) - 1) if len(x_labels) > 1 else 0.5)

    def y_at(value: float) -> float:
        return top + span_y * (ticks[-1] - value) / (ticks[-1] - ticks[0])

    out = [_open(width, height, title, f"{y_axis} over {x_axis}; {', '.join(series)}")]
    for tick, text in zip(ticks, tick_texts, strict=True):
        y = _place(y_at(tick))
        out.append(f'<path class="grid" d="M{left} {y}H{width - right}"/>')
        out.append(_text(left - 7, y_at(tick) + 4, text, anchor="end"))
    for i in _x_labels(x_labels, span_x):
        out.append(_text(x_at(i), height - bottom + 18, x_labels[i]))
    out.append(_text(left + span_x / 2, height - 8, x_axis, extra=' class="axis"'))
    turned = f' class="axis" transform="rotate(-90 14 {_place(top + span_y / 2)})"'
    out.append(_text(14, top + span_y / 2, y_axis, extra=turned))
    if reference is not None:
        y = y_at(reference[0])
        out.append(f'<path class="reference" d="M{left} {_place(y)}H{width - right}"/>')
        out.append(_text(width - right - 4, y - 5, reference[1], anchor="end"))
    for number, (name, values) in enumerate(series.items()):
        style = number if styles is None else styles[number]
        out.append(f'<g class="{_style(style)}"{_dash(style)}>')
        out.append(f'<path class="line" d="{_path(values, x_at, y_at)}"/>')
        for i, value in enumerate(values):
            if math.isfinite(value):
                hint = f"{name}, {x_axis} {x_labels[i]}: {form(value)}"
                out.append(
                    f'<circle cx="{_place(x_at(i))}" cy="{_place(y_at(value))}" r="2.6">'
                    f"<title>{escape(hint)}</title></circle>"
                )
        out.append("</g>")
    return "".join(out) + "</svg>"


def _style(number: int) -> str:
    return f"s{number % SERIES_STYLES}"


def _dash(number: int) -> str:
    dash = _DASHES[number // SERIES_STYLES % len(_DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _path(
    values: Sequence[float], x_at: Callable[[int], float], y_at: Callable[[float], float]
) -> str:
    out, pen_down = [], False
    for i, value in enumerate(values):
        if math.isfinite(value):
            out.append(f"{'L' if pen_down else 'M'}{_place(x_at(i))} {_place(y_at(value))}")
        pen_down = math.isfinite(value)
    return "".join(out)


def legend(names: Sequence[str]) -> str:
    """Return HTML that says which line is which, styles in the order of ``names``."""
    items = [
        f'<li><svg viewBox="0 0 28 10" aria-hidden="true"><g class="{_style(i)}"{_dash(i)}>'
        f'<path class="line" d="M1 5H27"/></g></svg>{escape(name)}</li>'
        for i, name in enumerate(names)
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Mapping[tuple[int, int], float],
    *,
    x_axis: str,
    value_name: str,
    form: Callable[[float], str] = "{:.3g}".format,
    scale: tuple[float, float] | None = None,
    width: int = 760,
) -> str:
    """Return an SVG with a coloured cell for each (row, column) in ``values``.

    Args:
        title: For screen readers.
        rows: Names, from the top.
        columns: Names, from the left.
        values: By number of row and of column; a missing or NaN one is left blank.
        x_axis: What the columns are.
        value_name: What the values are, with the unit.
        form: How values are written.
        scale: Values of the palest and the strongest colour; the least and the largest value if
            left out.
        width: Of the drawing, in its own units.
    """
    finite = [v for v in values.values() if math.isfinite(v)]
    low, high = scale or (min(finite, default=0.0), max(finite, default=1.0))
    left, top, cell, right = 16 + 7 * max(map(len, rows), default=0), 4, 22, 12
    step = (width - left - right) / max(1, len(columns))
    bottom_of_cells = top + cell * len(rows)
    height = bottom_of_cells + 88
    out = [_open(width, height, title, f"{value_name}, one row per module kind, over {x_axis}")]

    def strength(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.5
        return 0.06 + 0.94 * min(1.0, max(0.0, share))

    for r, row in enumerate(rows):
        y = top + cell * r
        out.append(_text(left - 7, y + cell / 2 + 4, row, anchor="end"))
        for c, column in enumerate(columns):
            value = values.get((r, c), math.nan)
            x, size = left + step * c, f'width="{_place(step)}" height="{cell}"'
            if math.isfinite(value):
                hint = escape(f"{row}, {x_axis} {column}: {form(value)}")
                out.append(
                    f'<rect class="cell" x="{_place(x)}" y="{y}" {size} '
                    f'fill-opacity="{strength(value):.3f}"><title>{hint}</title></rect>'
                )
    for i in _x_labels(columns, step * len(columns)):
        out.append(_text(left + step * (i + 0.5), bottom_of_cells + 16, columns[i]))
    out.append(
        _text(left + step * len(columns) / 2, bottom_of_cells + 34, x_axis, extra=' class="axis"')
    )
    y, swatch = bottom_of_cells + 56, 20
    for i in range(8):
        opacity = strength(low + (high - low) * i / 7)
        out.append(
            f'<rect class="cell" x="{left + swatch * i}" y="{y}" width="{swatch}" height="12" '
            f'fill-opacity="{opacity:.3f}"/>'
        )
    out.append(_text(left - 7, y + 10, form(low), anchor="end"))
    out.append(_text(left + 8 * swatch + 7, y + 10, f"{form(high)}   {value_name}", anchor="start"))
    return "".join(out) + "</svg>"

"""Bar charts as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["grouped_bars"]

# Distinguishable with the common kinds of colour blindness (Okabe and Ito).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def grouped_bars(
    file: Path,
    series: Mapping[str, Sequence[float]],
    labels: Sequence[str],
    *,
    title: str,
    axis: str,
    reference: float | None = None,
    separators: Sequence[int] = (),
    form: str = "%.3g",
) -> Path:
    """Draw one group of horizontal bars per label, one bar of each series in it, values beside.

    Args:
        file: PNG file to write.
        series: Name to one value per label; a series has one colour in all groups.
        labels: Names of the groups, from the top.
        title: Above the chart.
        axis: What the values are, with the unit.
        reference: Draw a line at this value.
        separators: Labels before which a thin line is drawn.
        form: Format of the values, in printf's style.

    Returns:
        ``file``.

    Raises:
        ValueError: A series has another number of values than there are labels.
    """
    for name, values in series.items():
        if len(values) != len(labels):
            raise ValueError(f"{name}: expected {len(labels)} values, got {len(values)}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    thickness = 0.8 / len(series)
    figure = Figure(figsize=(9, 1.6 + 0.24 * len(labels) * (len(series) + 0.8)), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, (name, values) in enumerate(series.items()):
        places = [row + (i - (len(series) - 1) / 2) * thickness for row in range(len(labels))]
        bars = axes.barh(places, values, 0.92 * thickness, label=name, color=COLOURS[i % 6])
        axes.bar_label(bars, fmt=form, padding=2, fontsize=7)
    if reference is not None:
        axes.axvline(reference, color="0.3", linewidth=0.8, linestyle="--")
    for row in separators:
        axes.axhline(row - 0.5, color="0.85", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.set_xlabel(axis)
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(ncols=len(series), loc="lower center", frameon=False)
    figure.tight_layout(rect=(0, 0.35 / figure.get_figheight(), 1, 1))
    figure.savefig(file)
    return file

import math
import xml.etree.ElementTree as ElementTree

import pytest

from mergeme_ext.report.svg import _ticks, heat_map, line_chart

SVG = "{http://www.w3.org/2000/svg}"


def chart(series, **options):
    labels = [str(i) for i in range(len(next(iter(series.values()))))]
    text = line_chart("t", labels, series, x_axis="layer", y_axis="cosine", **options)
    return ElementTree.fromstring(text)


@pytest.mark.parametrize(
    "low, high", [(0, 1), (-0.3, 0.02), (1e-9, 3e-9), (-5e12, 7e12), (0.4, 0.401)]
)
def test_ticks_cover_the_range(low, high):
    ticks = _ticks(low, high)
    assert ticks[0] <= low + 1e-9 * (high - low) and ticks[-1] >= high - 1e-9 * (high - low)
    assert 3 <= len(ticks) <= 12 and ticks == sorted(set(ticks))


def test_points_lie_where_the_axis_says():
    drawing = chart({"a": [0.0, 0.5, 1.0]}, height=300)
    points = [float(c.get("cy")) for c in drawing.iter(f"{SVG}circle")]
    assert points[1] == pytest.approx((points[0] + points[2]) / 2, abs=0.1)
    assert points[0] > points[2]  # y grows downwards
    titles = [t.text for t in drawing.iter(f"{SVG}title")]
    assert titles == ["a, layer 0: 0", "a, layer 1: 0.5", "a, layer 2: 1"]


def test_a_gap_for_a_missing_value():
    drawing = chart({"a": [0.0, 1.0, math.nan, 2.0, math.inf]})
    (line,) = [p for p in drawing.iter(f"{SVG}path") if p.get("class") == "line"]
    assert line.get("d").count("M") == 2 and len(list(drawing.iter(f"{SVG}circle"))) == 3


@pytest.mark.parametrize("values", [[math.nan], [0.0], [3.0, 3.0], [-1e-300, 1e-300]])
def test_degenerate_series(values):
    assert "nan" not in ElementTree.tostring(chart({"a": values})).decode()


def test_wrong_length():
    with pytest.raises(ValueError, match="b: expected 2 values, got 3"):
        line_chart("t", ["0", "1"], {"b": [1, 2, 3]}, x_axis="x", y_axis="y")


def test_heat_map():
    values = {(0, 0): 0.0, (0, 1): 1.0, (1, 0): 0.5, (1, 1): math.nan}
    text = heat_map("t", ["r<", "s"], ["0", "1"], values, x_axis="layer", value_name="share")
    cells = [c for c in ElementTree.fromstring(text).iter(f"{SVG}rect") if len(c)]
    assert [float(c.get("fill-opacity")) for c in cells] == pytest.approx([0.06, 1, 0.53])
    assert cells[0][0].text == "r<, layer 0: 0"

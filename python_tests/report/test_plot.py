import pytest

from mergeme_ext.report import grouped_bars

pytest.importorskip("matplotlib")


def test_writes_a_png(tmp_path):
    file = tmp_path / "chart.png"
    series = {"medicine": [-20.0, 3.5, 0.0], "code": [1.0, -8.0, 0.5]}
    out = grouped_bars(
        file, series, ["a", "b", "c"], title="T", axis="%", reference=0.0, separators=[1]
    )
    assert out == file and file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 5000


def test_refuses_a_series_of_another_length(tmp_path):
    with pytest.raises(ValueError, match="code: expected 2 values, got 1"):
        grouped_bars(
            tmp_path / "x.png", {"medicine": [1, 2], "code": [1]}, ["a", "b"], title="", axis=""
        )
    assert not list(tmp_path.iterdir())

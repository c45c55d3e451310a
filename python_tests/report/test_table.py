import pytest

from mergeme_ext.report import text_table

ROWS = [["base", "1.00", "20.50"], ["a longer name", "12.25", "3.00"]]


def test_columns_line_up():
    expected = """\
model           left   right
-----------------------------
base            1.00*  20.50
a longer name  12.25    3.00*"""
    marked = {(0, 1), (1, 2)}
    assert text_table(["model", "left", "right"], ROWS, marked=marked) == expected


def test_rules_and_no_rows():
    text = text_table(["a", "b"], [["x", "1"], ["y", "2"]], rules={1}).splitlines()
    assert [set(line) == {"-"} for line in text] == [False, True, False, True, False]
    assert text_table(["a", "b"], []) == "a  b"


def test_widest_cell_of_every_column_decides():
    lines = text_table(["", "x"], [["é" * 7, "1234567"], ["", ""]]).splitlines()
    assert lines[0].endswith("x") and lines[2] == "é" * 7 + "  1234567"


def test_refuses_a_row_of_another_length():
    with pytest.raises(ValueError, match="row 1: expected 2 cells, got 3"):
        text_table(["a", "b"], [["x", "1"], ["x", "1", "2"]])

"""Aligned text tables."""

from collections.abc import Collection, Sequence

__all__ = ["text_table"]


def text_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    marked: Collection[tuple[int, int]] = (),
    rules: Collection[int] = (),
) -> str:
    """Return ``rows`` under ``header`` in columns: the first flush left, the others flush right.

    Args:
        header: C titles.
        rows: R rows of C cells.
        marked: (row, column) of cells that get a star.
        rules: Rows above which a line is drawn.

    Raises:
        ValueError: A row has another number of cells than the header.
    """
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"row {number}: expected {len(header)} cells, got {len(row)}")

    def cell(row: int, column: int, text: str) -> str:
        if column == 0:
            return text
        return text + ("*" if (row, column) in marked else " ")

    cells = [[cell(-1, c, text) for c, text in enumerate(header)]]
    cells += [[cell(r, c, text) for c, text in enumerate(row)] for r, row in enumerate(rows)]
    widths = [max(len(row[c]) for row in cells) for c in range(len(header))]
    lines = []
    for number, row in enumerate(cells, -1):
        if number == 0 or number in rules:
            lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
        padded = [row[0].ljust(widths[0])]
        padded += [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)

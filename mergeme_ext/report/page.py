"""One HTML page that needs nothing beside it: no script, no font, no network."""

from collections.abc import Sequence
from html import escape

__all__ = ["details", "figure", "html_page", "html_table"]

# Okabe and Ito's colours, which the common kinds of colour blindness can tell apart; the second
# list is lightened for a dark page.
_LIGHT = ("#0072b2", "#d55e00", "#008a63", "#b3508a", "#7a6a00", "#3c8fc4", "#8a4b08", "#555555")
_DARK = ("#56b4e9", "#ff9248", "#3fd2a3", "#e39ac4", "#f0e442", "#9ad0f5", "#e0b070", "#bbbbbb")

_CSS = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --soft: #59636e; --rule: #d8dee4;
  --panel: #f6f8fa; --heat: #0a63a8; --warn: #9a3412; LIGHT }
@media (prefers-color-scheme: dark) { :root { --paper: #0f1419; --ink: #e6e9ec; --soft: #9aa6b2;
  --rule: #2d353d; --panel: #171d23; --heat: #5fb5f5; --warn: #ffb088; DARK } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 70rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .4rem }
h3 { font-size: .95rem; margin: 0 0 .2rem; font-weight: 600; overflow-wrap: anywhere }
p, ul { margin: .4rem 0 .8rem; max-width: 46rem }
.soft, figcaption, .legend { color: var(--soft); font-size: .9rem }
.warning { border-left: 4px solid var(--warn); padding: .4rem .8rem; background: var(--panel) }
figure { margin: .6rem 0 1rem }
figcaption { max-width: 46rem }
svg { width: 100%; height: auto; display: block; overflow: visible }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif }
svg text.axis { fill: var(--ink) }
.grid { stroke: var(--rule); fill: none }
.reference { stroke: var(--soft); stroke-dasharray: 4 4; fill: none }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round }
circle { stroke: none }
.cell { fill: var(--heat); stroke: var(--paper); stroke-width: 1 }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; padding: 0;
  margin: .3rem 0 }
.legend li { display: flex; align-items: center; gap: .45rem }
.legend svg { width: 28px; flex: none }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums }
th, td { padding: .22rem .55rem; text-align: right; border-bottom: 1px solid var(--rule);
  white-space: nowrap }
th { font-weight: 600; vertical-align: bottom }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
tr.rule td { border-top: 2px solid var(--rule) }
summary { cursor: pointer; color: var(--soft); font-size: .9rem }
"""


def _colours() -> str:
    def variables(colours: Sequence[str]) -> str:
        return " ".join(f"--s{i}: {colour};" for i, colour in enumerate(colours))

    css = _CSS.replace("LIGHT", variables(_LIGHT)).replace("DARK", variables(_DARK))
    rules = (
        f".s{i} .line {{ stroke: var(--s{i}) }} .s{i} circle {{ fill: var(--s{i}) }}"
        for i in range(len(_LIGHT))
    )
    return css + "\n".join(rules)


def html_page(title: str, body: Sequence[str]) -> str:
    """Return a whole page.

    Args:
        title: Plain text; becomes the first heading too.
        body: Parts in HTML, already escaped.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_colours()}\n</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def html_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, rules: Sequence[int] = ()
) -> str:
    """Return a table of plain texts, the first column flush left, a line above rows ``rules``."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in header)
    lines = []
    for number, row in enumerate(rows):
        cells = "".join(f"<td>{escape(text)}</td>" for text in row)
        kind = ' class="rule"' if number in rules else ""
        lines.append(f"<tr{kind}>{cells}</tr>")
    body = "".join(lines)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def figure(drawing: str, caption: str) -> str:
    """Return ``drawing`` (HTML) over ``caption`` (plain text)."""
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def details(summary: str, content: str) -> str:
    """Return ``content`` (HTML), folded away under ``summary`` (plain text)."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"

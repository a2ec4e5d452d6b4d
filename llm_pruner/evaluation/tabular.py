"""Format numbers and tables of text for people: short numbers, Markdown, LaTeX, the terminal."""

from __future__ import annotations

from math import isfinite
from typing import Literal

from rich.table import Table as TerminalTable
from rich.text import Text

Marks = tuple[str, str]  # around the best number
MARKDOWN: Marks = ("**", "**")
LATEX: Marks = (r"\textbf{", "}")
TERMINAL: Marks = ("[bold]", "[/bold]")
SPECIAL = str.maketrans({c: f"\\{c}" for c in "_%&#$"} | {"±": r"$\pm$", "~": r"\textasciitilde{}"})
LONGEST_NAME = 32  # characters of the first column in a terminal
LONGEST_LABEL = 40  # characters of a label in a figure
BORDER = 3  # columns of a terminal that a column of a table takes beside its text


def short_number(value: float, *, giga: str = "G") -> str:
    """Format a count with three digits and a prefix.

    >>> [short_number(n) for n in (0, 950, 59872, 134515008, 17779654656)]
    ['0', '950', '59.9 k', '135 M', '17.8 G']
    >>> short_number(6738415616, giga="B")
    '6.74 B'
    """
    return _with_prefix(value, 1000, ("", "k", "M", giga, "T", "P"))


def short_bytes(value: float) -> str:
    """Format a number of bytes with three digits and a binary prefix.

    >>> [short_bytes(n) for n in (200, 5898240, 538060032, 13529146982)]
    ['200 B', '5.62 MiB', '513 MiB', '12.6 GiB']
    """
    return _with_prefix(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def _with_prefix(value: float, base: int, prefixes: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= base - 0.5 and power < len(prefixes) - 1:
        value, power = value / base, power + 1
    digits = 0 if power == 0 and value == int(value) else max(0, 3 - len(str(int(abs(value)))))
    return f"{value:.{digits}f} {prefixes[power]}".strip()


def short_score(value: float) -> str:
    """Format a perplexity or a speed: two decimals, fewer for large numbers.

    >>> [short_score(x) for x in (2.7489, 52.786, 497.04, 3420.5, 1.2e9, float("inf"))]
    ['2.75', '52.79', '497.0', '3,420', '1.2e+09', 'inf']
    """
    if not isfinite(value):
        return str(value)
    if abs(value) >= 1e7:
        return f"{value:.2g}"
    return f"{value:,.{2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0}f}"


def short_percent(share: float) -> str:
    """Format a share in percent with one decimal, without the sign.

    >>> short_percent(0.78819)
    '78.8'
    """
    return f"{100 * share:.1f}"


def shorten(text: str, longest: int = LONGEST_LABEL) -> str:
    """Replace the middle of a long text by an ellipsis.

    >>> shorten("a" * 20 + "b" * 20, 32)
    'aaaaaaaaaaaaaaa…bbbbbbbbbbbbbbbb'
    """
    half = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[half + 1 - longest :]}"


def markdown(cells: list[list[str]]) -> str:
    """Format cells as a Markdown table, numbers to the right; the first row is its head."""
    lines = [cells[0], ["---", *["---:"] * (len(cells[0]) - 1)], *cells[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def latex(cells: list[list[str]]) -> str:
    """Format cells as a LaTeX table with booktabs; LaTeX commands in cells are kept."""

    def line(row: list[str]) -> str:
        return " & ".join(cell.translate(SPECIAL) for cell in row) + r" \\"

    head, *body = map(line, cells)
    lines = [f"\\begin{{tabular}}{{l{'r' * (len(cells[0]) - 1)}}}", "\\toprule", head, "\\midrule", *body]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def terminal_table(cells: list[list[str]]) -> TerminalTable:
    """Format cells as a table for the terminal, whose columns wrap; the first row is its head."""
    head, *body = cells
    shown = TerminalTable(*head)
    for row in body:
        shown.add_row(*row)
    return shown


def terminal_tables(cells: list[list[str]], width: int, labels: int = 1) -> list[TerminalTable]:
    """Format cells as tables no wider than a terminal, in which no word is broken.

    Args:
        labels: leading columns that name the row, and so begin every table.
    """
    columns = [list(column) for column in zip(*cells, strict=True)]
    names = [[shorten(cell, LONGEST_NAME) for cell in column] for column in columns[:labels]]
    groups: list[list[list[str]]] = []
    room = 0
    for column in columns[labels:]:
        taken = _text_width(column) + BORDER
        if not groups or taken > room:
            groups.append([])
            room = width - sum(_text_width(name) + BORDER for name in names) - 1
        groups[-1].append(column)
        room -= taken
    return [_table_of([*names, *group], labels) for group in groups or [[]]]


def _table_of(columns: list[list[str]], labels: int) -> TerminalTable:
    shown = TerminalTable()
    for i, column in enumerate(columns):
        justify: Literal["left", "right"] = "left" if i < labels else "right"
        shown.add_column(column[0], width=_text_width(column), justify=justify)
    for row in zip(*(column[1:] for column in columns), strict=True):
        shown.add_row(*row)
    return shown


def _text_width(column: list[str]) -> int:
    """Return the width of a column whose head wraps between words and whose cells do not."""
    head, *body = column
    return max(len(text) for text in (*(head.split() or [""]), *(Text.from_markup(cell).plain for cell in body)))

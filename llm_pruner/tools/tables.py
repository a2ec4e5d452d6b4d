"""Print tables within the width of a terminal, without breaking a name or a word."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from textwrap import wrap

from rich.console import Console

from ..display import Cells

GAP = "  "  # between columns
INDENT = "  "  # of details below their row
NARROWEST = 12  # characters of a column of text that is wrapped


def print_table(
    console: Console, title: str, cells: Cells, *, texts: Sequence[int] = (), details: int | None = None
) -> None:
    """Print a table, head first, within the console's width.

    The first column holds names. A name too long for its column stands on a line of its own above the rest of its row.

    Args:
        texts: columns of text, wrapped between words where the table is too wide, the last one first. All columns but
            these, the names and the details hold numbers, aligned to the right.
        details: column of lines that move below their row where the table is too wide.
    """
    print_text(console, title, style="bold")
    for line in [*format_table(cells, console.width, texts=texts, details=details), ""]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_text(console: Console, text: str, *, style: str | None = None) -> None:
    """Print lines of text, wrapped between words at the console's width."""
    for line in text.split("\n"):
        wrapped = wrap(line, console.width, break_long_words=False, break_on_hyphens=False)
        console.print("\n".join(wrapped), style=style, highlight=False, markup=False, soft_wrap=True)


def format_table(cells: Cells, width: int, *, texts: Sequence[int] = (), details: int | None = None) -> list[str]:
    """Format a table as lines: the head, a rule and the rows; see :func:`print_table`.

    >>> cells = [["unit", "size", "parameters"], ["layers.0.mlp.neurons", "48", "gate.weight[0]\\nup.weight[0]"]]
    >>> print("\\n".join(format_table(cells, 30, details=2)))
    unit                  size
      parameters
    ──────────────────────────
    layers.0.mlp.neurons    48
      gate.weight[0]
      up.weight[0]
    """
    below: list[list[str]] = [[] for _ in cells]
    if details is not None and _total(_widths(cells)) > width:
        below = [[INDENT + line for line in row[details].split("\n")] for row in cells]
        cells = [[cell for i, cell in enumerate(row) if i != details] for row in cells]
        texts = [i - (i > details) for i in texts if i != details]
        details = None
    widths = _fit(_widths(cells), cells, width, texts)
    left = {0, *texts} if details is None else {0, *texts, details}
    rows = [[*_row_lines(row, widths, left), *lines] for row, lines in zip(cells, below, strict=True)]
    rule = "─" * max(len(line) for row in rows for line in row)
    return [*rows[0], rule, *(line for row in rows[1:] for line in row)]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _widths(cells: Cells) -> list[int]:
    return [max(len(line) for cell in column for line in cell.split("\n")) for column in zip(*cells, strict=True)]


def _fit(widths: list[int], cells: Cells, width: int, texts: Sequence[int]) -> list[int]:
    """Narrow columns of text, the last one first, then the column of names, until the table fits."""
    widths = list(widths)
    for column in [*reversed(texts), 0]:
        excess = _total(widths) - width
        if excess > 0:
            words = [word for row in cells for word in row[column].split()]
            shortest = len(cells[0][0]) if column == 0 else max(NARROWEST, *map(len, words))
            widths[column] = max(widths[column] - excess, min(shortest, widths[column]))
    return widths


def _row_lines(row: Sequence[str], widths: Sequence[int], left: set[int]) -> list[str]:
    """Return the lines of a row: its cells, wrapped to their columns, below a name that its column cannot hold."""
    name, *others = row
    above = [name] if len(name) > widths[0] else []
    columns = [[""] if above else [name]]
    for i, cell in enumerate(others, 1):
        columns.append([part for line in cell.split("\n") for part in wrap(line, widths[i]) or [""]])
    lines = [*above]
    for parts in zip_longest(*columns, fillvalue=""):
        padded = [f"{part:{'<' if i in left else '>'}{widths[i]}}" for i, part in enumerate(parts)]
        lines.append(GAP.join(padded).rstrip())
    return lines

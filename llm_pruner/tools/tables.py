"""Print tables whose cells break between words and between the parts of dotted names, never inside them."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ..display import Cells

GAP = 2  # characters between columns
NARROWEST = 12  # characters of a column whose cells break


def print_table(console: Console, title: str, cells: Cells, breakable: Sequence[int] = (0,)) -> None:
    """Print a table, head first, within the console's width.

    Args:
        breakable: columns of dotted names or text, broken where the table is too wide, the last one first. All others
            hold numbers and stand to the right.
    """
    widths = [max(len(line) for cell in column for line in cell.split("\n")) for column in zip(*cells, strict=True)]
    for column in reversed(breakable):
        excess = sum(widths) + GAP * (len(widths) - 1) - console.width
        if excess > 0:
            widths[column] = max(widths[column] - excess, NARROWEST, _longest_part(cells, column))
    head, *body = cells
    columns = [Column(Text(name), justify="right", width=width) for name, width in zip(head, widths)]
    for i in breakable:
        columns[i].justify = "left"
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0), pad_edge=False, show_edge=False)
    for row in body:
        lines = (break_at_dots(cell, widths[i]) if i in breakable else cell for i, cell in enumerate(row))
        table.add_row(*map(Text, lines))  # no markup: "[dim]" would be a style
    console.print(title, style="bold", highlight=False, markup=False)
    console.print(table)
    console.print()


def _longest_part(cells: Cells, column: int) -> int:
    """Return the length of the longest part of a column's cells that nothing breaks."""
    return max(len(part) for row in cells for word in row[column].split() for part in _parts(word))


def _parts(word: str) -> list[str]:
    *first, last = word.split(".")
    return [*(f"{part}." for part in first), last]


def break_at_dots(text: str, width: int) -> str:
    """Break words that are longer than a line after their dots.

    >>> break_at_dots("model.layers.0.self_attn.heads", 16).split()
    ['model.layers.0.', 'self_attn.heads']
    """
    return "\n".join(" ".join(_break_word(word, width) for word in line.split(" ")) for line in text.split("\n"))


def _break_word(word: str, width: int) -> str:
    if len(word) <= width:
        return word
    lines = [""]
    for part in _parts(word):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)

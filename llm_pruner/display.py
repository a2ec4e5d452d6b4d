"""Tables and plots for notebooks. The objects that a user holds fill them; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import TYPE_CHECKING

from .errors import PrunerError
from .optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cells = list[list[str]]  # rows of a table, head first
Shares = Mapping[str, Mapping[int | None, float]]  # by row and layer; layer None: the whole model
MOST_LABELLED = 48  # columns that leave room for numbers in the cells
WIDEST = 16.0  # inches


def amount(count: float) -> str:
    """Format a count in three or four digits.

    >>> [amount(n) for n in (960, 49152, 134515008, 6738415616)]
    ['960', '49.2 k', '134.5 M', '6.738 G']
    """
    for size, letter, digits in ((1e9, "G", 3), (1e6, "M", 1), (1e3, "k", 1)):
        if count >= size:
            return f"{count / size:.{digits}f} {letter}"
    return f"{count:.0f}"


def percent(share: float | None) -> str:
    """Format a share in percent with the digits that tell it from 0; None is a dash.

    >>> [percent(share) for share in (0.78819, 0.00061234, 0.0, None)]
    ['78.8%', '0.061%', '0%', '-']
    """
    if share is None:
        return "-"
    return f"{share:.1%}" if abs(share) >= 0.01 else f"{100 * share:.2g}%"


def html_table(title: str, cells: Cells, notes: Iterable[str] = ()) -> str:
    """Format a table for a notebook: title above, head, rows with numbers on the right, notes below."""
    head, *body = cells
    rows = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"]
    for first, *others in body:
        numbers = "".join(f'<td style="text-align: right">{escape(cell)}</td>' for cell in others)
        rows.append(f'<tr><td style="text-align: left">{escape(first)}</td>{numbers}</tr>')
    below = "".join(f"<div>{escape(note)}</div>" for note in notes)
    return f"<div><b>{escape(title)}</b><table>{''.join(rows)}</table>{below}</div>"


def plot_shares(
    shares: Shares, *, title: str, label: str, highest: float | None = None, ax: Axes | None = None
) -> Axes:
    """Draw shares as a grid: a row per kind of unit, a column per layer, and one for units of the whole model.

    Args:
        label: meaning of a cell, written at the colour bar.
        highest: share with the brightest colour, None for the largest of a layer.
        ax: axes to draw in, None for a new figure.

    Raises:
        PrunerError: there is nothing to draw, or matplotlib is not installed.
    """
    require("matplotlib", "report", "plots need")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    columns = sorted({layer for row in shares.values() for layer in row}, key=lambda layer: (layer is None, layer or 0))
    if not columns:
        raise PrunerError("nothing to plot: there are no units")
    if highest is None:
        in_layers = [share for row in shares.values() for layer, share in row.items() if layer is not None]
        highest = max(in_layers, default=None)
    if ax is None:
        size = min(max(5.0, 0.32 * len(columns) + 3.0), WIDEST), 0.4 * len(shares) + 1.7
        _, ax = pyplot.subplots(figsize=size, layout="constrained")
    grid = [[row.get(column, float("nan")) for column in columns] for row in shares.values()]
    image = ax.imshow(grid, aspect="auto", cmap="cividis", vmin=0, vmax=highest)
    if len(columns) <= MOST_LABELLED:
        _write_numbers(ax, grid, highest or 1.0)
    step = len(columns) // MOST_LABELLED + 1
    ax.set_xticks(range(0, len(columns), step), ["all" if c is None else str(c) for c in columns[::step]])
    ax.set_yticks(range(len(shares)), [_plain(kind) for kind in shares])
    ax.tick_params(length=0, labelsize=8)
    ax.set_xlabel("layer")
    ax.set_title(_plain(title), fontsize=10)
    ax.figure.colorbar(image, ax=ax, label=label, format=PercentFormatter(1.0))
    return ax


def _plain(name: str) -> str:
    """Return a name that matplotlib does not take for mathematics."""
    return name.replace("$", r"\$")


def _write_numbers(ax: Axes, grid: list[list[float]], highest: float) -> None:
    """Write every share into its cell, in percent, dark on bright cells and bright on dark ones."""
    for y, row in enumerate(grid):
        for x, share in enumerate(row):
            if share == share:
                colour = "black" if share > 0.6 * highest else "white"
                digits = 0 if share >= 0.0995 or not share else 1
                ax.text(x, y, f"{100 * share:.{digits}f}", ha="center", va="center", fontsize=7, color=colour)

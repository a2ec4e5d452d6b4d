"""Read the results of sweeps; draw curves over the swept arguments, and tabulate them by method and value."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..errors import PrunerError
from ..evaluation.tabular import short_score, shorten
from ..files import read_json
from .drawing import (
    Drawing,
    LineStyle,
    add_legend,
    draw_level,
    new_axes,
    slug,
    styles_of,
)
from .labels import Label, name_points
from .tradeoffs import set_quality_axis

RESULTS, SWEEP = "results.json", "sweep.json"
PERPLEXITY = "perplexity "
MOST_TICKS = 8
TAYLOR = ("vectorize", "param_first", "param_second", "param_mix")
Values = dict[float, list[float]]  # results of all seeds by the swept number


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The results of a sweep.

    Attributes:
        rows: results of the points; the original is not among them.
        original: results of the original, empty if none or several were measured.
        varied: swept arguments, without the seed.
    """

    name: str
    rows: list[dict[str, Any]]
    original: dict[str, Any]
    varied: list[str]

    def numeric(self) -> list[str]:
        """Return the swept arguments that are numbers with at least two values."""
        return [key for key in self.varied if len({r[key] for r in self.rows if _is_number(r.get(key))}) > 1]

    def qualities(self) -> list[str]:
        """Return the measurements of quality, accuracies too."""
        keys = dict.fromkeys(key for row in self.rows for key in row)
        return [key for key in keys if key.startswith(PERPLEXITY) or key.endswith((" acc", " acc_norm"))]

    def lines(self, key: str, quality: str) -> dict[str, Values]:
        """Return, for each combination of the other arguments, its results by the swept number."""
        lines: dict[str, Values] = defaultdict(lambda: defaultdict(list))
        for row in self.rows:
            value = value_of(row, quality)
            if _is_number(row.get(key)) and value is not None:
                lines[self._method(row, key)][row[key]].append(value)
        return {method: {x: values[x] for x in sorted(values)} for method, values in lines.items()}

    def _method(self, row: Mapping[str, Any], swept: str) -> str:
        """Return the values of the other arguments: a criterion by its value alone."""
        parts = []
        for key in self.varied:
            name = key.rpartition(".")[2]
            if key != swept and row.get(key) is not None:
                parts.append(str(row[key]) if isinstance(row[key], str) else f"{name} {row[key]}")
        return ", ".join(parts) or "all runs"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def value_of(row: Mapping[str, Any], quality: str) -> float | None:
    """Return a finite result, accuracies in percent."""
    value: Any = row.get(quality)
    if not (_is_number(value) and math.isfinite(value)):
        return None
    return value if quality.startswith(PERPLEXITY) else 100 * value


def read_sweep(folder: str | Path) -> Sweep | None:
    """Return the results of a sweep's output folder; None if the folder holds no sweep.

    Raises:
        PrunerError: its results are damaged.
    """
    folder = Path(folder)
    if not ((folder / SWEEP).is_file() and (folder / RESULTS).is_file()):
        return None
    sweep, rows = read_json(folder / SWEEP), read_json(folder / RESULTS)
    try:
        originals = [row for row in rows if row.get("point") == 0]
        return Sweep(
            name=folder.resolve().name,
            rows=[row for row in rows if row.get("point") != 0],
            original=originals[0] if len(originals) == 1 else {},
            varied=[key for key in sweep["varied"] if key != "seed"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise PrunerError(f"the results of the sweep {folder} are damaged: {type(error).__name__} {error}") from error


def draw_sweep(sweep: Sweep, styles: Mapping[str, LineStyle] | None = None) -> list[Drawing]:
    """Draw every quality over every swept number, methods with the ``styles`` of other figures in theirs."""
    drawings = []
    for quality in sweep.qualities():
        for key in sweep.numeric():
            lines = sweep.lines(key, quality)
            if lines:
                drawings.append(_draw_curves(sweep, key, quality, lines, _styles(lines, styles or {})))
    return drawings


def _styles(methods: Iterable[str], known: Mapping[str, LineStyle]) -> dict[str, LineStyle]:
    """Return a style for each method: the known one, also where a sweep names a single Taylor variant ``taylor``."""
    styles = styles_of([*known, *methods]) | dict(known)
    variants = [name for name in known if name in TAYLOR]
    if len(variants) == 1:
        styles["taylor"] = known[variants[0]]
    return styles


def _draw_curves(
    sweep: Sweep, key: str, quality: str, lines: Mapping[str, Values], styles: Mapping[str, LineStyle]
) -> Drawing:
    swept = key.rpartition(".")[2]
    level = value_of(sweep.original, quality)
    with new_axes() as (figure, ax):
        title = f"sweep {sweep.name}: {quality} over {swept}"
        drawing = Drawing(slug(title), title, title, figure)
        handles = []
        for method, values in lines.items():
            style, xs, means = styles[method], list(values), [fmean(ys) for ys in values.values()]
            errors = [stdev(ys) if len(ys) > 1 else 0.0 for ys in values.values()]
            ax.plot(xs, means, linestyle=style.line, **style.marking)
            if any(errors):
                ax.errorbar(xs, means, yerr=errors, fmt="none", ecolor=style.colour, capsize=3, elinewidth=1.2)
            handles += ax.plot([], [], linestyle=style.line, label=shorten(method), **style.marking)
        ys = [fmean(ys) for values in lines.values() for ys in values.values()]
        text = quality.removeprefix(PERPLEXITY)
        axis = f"perplexity ({text})" if text != quality else f"{quality}, %"
        set_quality_axis(ax, ys if level is None else [*ys, level], axis)
        labels = _draw_level(ax, level, max(x for values in lines.values() for x in values))
        ax.set_xlabel(swept.replace("_", " "))
        numbers = sorted({x for values in lines.values() for x in values})
        if len(numbers) <= MOST_TICKS:
            ax.set_xticks(numbers, [f"{number:g}" for number in numbers])
        ax.margins(0.08, 0.14)
        add_legend(figure, handles)
        name_points(figure, ax, labels)
    return drawing


def _draw_level(ax: Any, level: float | None, x: float) -> list[Label]:
    if level is None:
        return []
    draw_level(ax, level)
    return [Label(x=x, y=level, text=f"unpruned: {short_score(level)}")]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of one quality: methods as rows, the swept numbers as columns.

    Attributes:
        rows: name, then a cell for each column, and whether the cell is the best of its column.
    """

    title: str
    heads: list[str]
    rows: list[tuple[str, list[tuple[str, bool]]]]


def tabulate_sweep(sweep: Sweep) -> list[Grid]:
    """Tabulate every quality by method and each swept number."""
    return [
        _grid(sweep, key, quality, lines)
        for quality in sweep.qualities()
        for key in sweep.numeric()
        if (lines := sweep.lines(key, quality))
    ]


def _grid(sweep: Sweep, key: str, quality: str, lines: Mapping[str, Values]) -> Grid:
    numbers = sorted({x for values in lines.values() for x in values})
    best_of: Callable[[Sequence[float]], float] = min if quality.startswith(PERPLEXITY) else max
    best = {x: best_of([fmean(values[x]) for values in lines.values() if x in values]) for x in numbers}
    rows = []
    for method, values in lines.items():
        cells = [
            (_mean(values.get(x, ())), len(lines) > 1 and x in values and fmean(values[x]) == best[x]) for x in numbers
        ]
        rows.append((method, cells))
    level = value_of(sweep.original, quality)
    if level is not None:
        rows.insert(0, ("original", [(short_score(level), False)] * len(numbers)))
    swept = key.rpartition(".")[2]
    return Grid(title=f"{quality} by {swept}", heads=["", *(f"{number:g}" for number in numbers)], rows=rows)


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    return short_score(fmean(values)) + (f" ± {short_score(stdev(values))}" if len(values) > 1 else "")

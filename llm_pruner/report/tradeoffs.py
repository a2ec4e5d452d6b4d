"""Draw quality over cost: a line for each method, the original as the reference."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev
from typing import Any

from ..evaluation.tabular import short_score, shorten
from .drawing import (
    ORIGINAL_STYLE,
    Drawing,
    LineStyle,
    add_legend,
    draw_level,
    new_axes,
    slug,
    styles_of,
)
from .labels import Label, name_points
from .models import ORIGINAL
from .runs import MeasuredModel

Measure = Callable[[MeasuredModel], float | None]
WIDE = 4  # ratio of perplexities from which their axis is logarithmic
TICKS = (1, 1.5, 2, 3, 5, 7)
UNITS = ((1e9, ", billions"), (1e6, ", millions"), (1e3, ", thousands"), (1.0, ""))
MODELS_IN_ALT = 12


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """Quantity on an axis.

    Attributes:
        axis: label of the axis.
        title: full name, with the protocol.
    """

    axis: str
    title: str
    of: Measure
    error_of: Measure = lambda model: None


@dataclass(frozen=True, kw_only=True)
class Point:
    """A model, or the mean of models that differ in seeds alone."""

    x: float
    y: float
    x_error: float | None
    y_error: float | None
    label: str
    models: tuple[MeasuredModel, ...]

    @property
    def method(self) -> str:
        return self.models[0].method


def quantities_of_quality(models: Sequence[MeasuredModel]) -> list[Quantity]:
    """Return the perplexity of every text, and the accuracy."""
    texts = dict.fromkeys(text for model in models for text in model.perplexity)
    quantities = [
        Quantity(
            axis=f"perplexity ({text.partition(',')[0]})", title=f"perplexity, {text}", of=partial(_perplexity, text)
        )
        for text in texts
    ]
    percent = Quantity(
        axis="mean accuracy, %",
        title="mean accuracy of the tasks",
        of=lambda m: None if m.accuracy is None else 100 * m.accuracy,
        error_of=lambda m: None if m.accuracy_error is None else 100 * m.accuracy_error,
    )
    return [*quantities, percent]


def quantities_of_cost(models: Sequence[MeasuredModel]) -> list[Quantity]:
    """Return parameters, bytes, compute and every measured speed, in units that fit the largest model."""
    largest = max((m.parameters or 0 for m in models), default=0)
    unit, name = next(((unit, name) for unit, name in UNITS if largest >= unit), UNITS[-1])
    heaviest = max((m.weight_bytes or 0 for m in models), default=0)
    size, prefix = (2**30, "GiB") if heaviest >= 2**30 else (2**20, "MiB") if heaviest >= 2**20 else (2**10, "KiB")
    macs = max((m.macs or 0 for m in models), default=0)
    work, count = next(((unit, name) for unit, name in UNITS if macs >= unit), UNITS[-1])
    scales: list[tuple[str, str, Measure]] = [
        (f"parameters{name}", "parameters", lambda m: m.parameters / unit if m.parameters else None),
        (f"weights, {prefix}", "bytes of the weights", lambda m: m.weight_bytes / size if m.weight_bytes else None),
        (f"MACs{count}", "multiply-accumulates", lambda m: m.macs / work if m.macs else None),
    ]
    for what in dict.fromkeys(speed for model in models for speed in model.speeds):
        axis = f"tokens/s, {what} tokens"
        scales.append((axis, f"tokens per second, {what}", lambda m, w=what: m.speeds.get(w)))  # type: ignore[misc]
    return [Quantity(axis=axis, title=title, of=of) for axis, title, of in scales]


def _perplexity(text: str, model: MeasuredModel) -> float | None:
    return model.perplexity.get(text)


def draw_tradeoffs(models: Sequence[MeasuredModel]) -> list[Drawing]:
    """Draw every measure of quality over every measure of cost that at least two models have."""
    styles = styles_of_models(models)
    drawings = []
    for quality in quantities_of_quality(models):
        for cost in quantities_of_cost(models):
            points = average_seeds(models, cost, quality)
            if len({point.x for point in points}) > 1:
                drawings.append(_draw_tradeoff(points, cost, quality, styles))
    return drawings


def styles_of_models(models: Sequence[MeasuredModel]) -> dict[str, LineStyle]:
    """Return the style of every method but the original's, the same for all figures of these models."""
    return styles_of(dict.fromkeys(m.method for m in models if m.method != ORIGINAL))


def average_seeds(models: Sequence[MeasuredModel], cost: Quantity, quality: Quantity) -> list[Point]:
    """Return a point for each model, one for models that differ in their seeds alone."""
    groups: dict[Any, list[MeasuredModel]] = defaultdict(list)
    for model in models:
        x, y = cost.of(model), quality.of(model)
        if x is not None and y is not None and math.isfinite(y):
            groups[model.method, model.size, model.stage, None if model.seed is not None else model.model].append(model)
    points = []
    for group in groups.values():
        seeds_differ = len({model.seed for model in group}) == len(group)
        points += [_point_of(part, cost, quality) for part in ([group] if seeds_differ else [[m] for m in group])]
    several = {method for method in (p.method for p in points) if sum(q.method == method for q in points) > 1}
    return [_with_label(point, several) for point in points]


def _point_of(group: Sequence[MeasuredModel], cost: Quantity, quality: Quantity) -> Point:
    xs, ys = ([value for m in group if (value := q.of(m)) is not None] for q in (cost, quality))
    single = len(group) == 1
    return Point(
        x=fmean(xs),
        y=fmean(ys),
        x_error=None if single else stdev(xs),
        y_error=quality.error_of(group[0]) if single else stdev(ys),
        label=group[0].name,
        models=tuple(group),
    )


def _with_label(point: Point, several: set[str]) -> Point:
    """Name a point as the user did; where a recipe named its folder, or seeds are averaged, by its size."""
    model = point.models[0]
    of_recipe = len(point.models) > 1 or model.name.startswith(f"{model.method} ")
    label = model.size if of_recipe and model.size and point.method in several else model.name
    if model.stage == ORIGINAL:
        label = f"{model.name}, unpruned"
    return Point(**{**vars(point), "label": shorten(label, 28)})


def _draw_tradeoff(
    points: Sequence[Point], cost: Quantity, quality: Quantity, styles: Mapping[str, LineStyle]
) -> Drawing:
    with new_axes() as (figure, ax):
        name = slug(f"{quality.title.replace('perplexity, ', 'perplexity ')} over {cost.title}")
        drawing = Drawing(name, f"{quality.title}, over {cost.title}", "", figure)
        handles = draw_lines(ax, drawing, points, styles)
        set_quality_axis(ax, [p.y for p in points], quality.axis)
        ax.set_xlabel(cost.axis)
        ax.locator_params(axis="x", nbins=6)
        ax.margins(0.12, 0.14)
        add_legend(figure, handles)
        name_points(figure, ax, [Label(x=p.x, y=p.y, text=p.label) for p in points])
    listed = "; ".join(f"{p.method}, {p.label}: {p.y:.4g} at {p.x:,.5g}" for p in points[:MODELS_IN_ALT])
    drawing.alt = f"{drawing.title}. {listed}"
    return drawing


def draw_lines(ax: Any, drawing: Drawing, points: Sequence[Point], styles: Mapping[str, LineStyle]) -> list[Any]:
    """Draw a line for each method and a level for each original; return what the legend shows."""
    handles = []
    for method in dict.fromkeys(point.method for point in points):
        line = sorted((point for point in points if point.method == method), key=lambda point: point.x)
        style = styles.get(method, ORIGINAL_STYLE)
        if method == ORIGINAL:
            for point in line:
                draw_level(ax, point.y)
        else:
            ax.plot([p.x for p in line], [p.y for p in line], linestyle=style.line, color=style.colour, zorder=2)
        for point in line:
            _draw_point(ax, drawing, point, style)
        connect = "" if len(line) == 1 and method != ORIGINAL else style.line
        handles += ax.plot([], [], linestyle=connect, label=shorten(method), **style.marking)
    return handles


def _draw_point(ax: Any, drawing: Drawing, point: Point, style: LineStyle) -> None:
    if point.y_error or point.x_error:
        ax.errorbar(
            [point.x],
            [point.y],
            xerr=point.x_error or None,
            yerr=point.y_error or None,
            fmt="none",
            ecolor=style.colour,
            capsize=3,
            elinewidth=1.2,
            zorder=2,
        )
    (mark,) = ax.plot([point.x], [point.y], linestyle="", zorder=3, **style.marking)
    count = f", mean of {len(point.models)}" if len(point.models) > 1 else ""
    error = f" ± {point.y_error:.2g}" if point.y_error else ""
    drawing.tip(mark, f"{point.models[0].name} ({point.method}{count}): {point.y:.4g}{error} at {point.x:,.5g}")


def set_quality_axis(ax: Any, values: Sequence[float], label: str) -> None:
    """Label the axis of a quality; wide perplexities are drawn logarithmically, with plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ax.set_ylabel(shorten(label))
    ax.grid(True)
    low, high = min(values), max(values)
    if not label.startswith("perplexity"):
        return
    if low <= 0 or high <= WIDE * low:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        return
    ax.set_yscale("log")
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    factors = TICKS if high < 10 * low else (1, 2, 5) if high < 1000 * low else (1,)
    ax.yaxis.set_major_locator(FixedLocator([factor * 10.0**power for power in powers for factor in factors]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if value < 1e6 else short_score(value)))

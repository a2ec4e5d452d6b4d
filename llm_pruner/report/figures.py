"""Draw recoveries and prunings: losses over steps, widths by layer, scores with their cuts."""

from __future__ import annotations

from collections import defaultdict
from itertools import cycle
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from ..evaluation.tabular import shorten
from ..selection.plan import PruningPlan
from ..selection.search import ALLOCATION
from .drawing import (
    BLUE,
    COLOURS,
    GREY,
    LINES,
    MARKERS,
    ORANGE,
    PALE,
    Drawing,
    add_legend,
    freeze_layout,
    new_axes,
    slug,
)
from .runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAP_COLUMNS = 160  # of the sorted scores, which outnumber the dots of a page
MAP_QUANTILES = (0.02, 0.98)  # of the scores, which a few huge ones would flatten to one colour
BINS = 60
SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
MOST_NUMBERS = 5  # at a logarithmic axis
LAYER_TICKS = 8
MOST_SEPARATE_BARS = 40  # with more layers, gaps between them would only flicker
Points = list[tuple[float, float]]
# What criteria measure, for the axes of their scores.
UNITS = {
    "taylor": "change of the loss, nats",
    "l1": "L1 norm of the weights",
    "l2": "L2 norm of the weights",
    "random": "random score",
}


def draw_recoveries(runs: list[Run]) -> list[Drawing]:
    """Draw the losses of each recovery over its steps."""
    drawings = []
    for run in runs:
        losses = {n: points for n, points in run.curves.items() if (n == "loss" or n.endswith("_loss")) and points}
        if losses:
            drawings.append(_draw_recovery(run, losses))
    return drawings


def _draw_recovery(run: Run, losses: dict[str, Points]) -> Drawing:
    descriptions = []
    with new_axes() as (figure, ax):
        handles = []
        for (loss, points), colour, line, marker in zip(
            losses.items(), cycle(COLOURS), cycle(LINES), cycle(MARKERS), strict=False
        ):
            label = "training" if loss == "loss" else loss.removeprefix("eval_").removesuffix("_loss")
            mark = marker if len(points) <= 25 else None
            xs, ys = zip(*points, strict=True)
            handles += ax.plot(xs, ys, linestyle=line, color=colour, label=shorten(label), marker=mark)
            descriptions.append(f"{label} from {points[0][1]:.3f} to {points[-1][1]:.3f}")
        ax.set_xlabel("step")
        ax.set_ylabel("loss, nats per token")
        ax.grid(True)
        ax.locator_params(axis="both", nbins=6)
        add_legend(figure, handles)
        freeze_layout(figure)
    alt = f"losses of {run.name} over its steps: {'; '.join(descriptions)}"
    return Drawing(slug(f"{run.name} recovery"), f"{run.name}: losses of the recovery", alt, figure)


def draw_pruning(run: Run) -> list[Drawing]:
    """Draw, for each kind of unit, its widths by layer and, if scores are known, their map and their histogram."""
    plan = run.plan
    if plan is None:
        return []
    drawings = []
    for kind in dict.fromkeys(choice.kind for choice in plan.units.values() if choice.layer is not None):
        units = [n for n, choice in plan.units.items() if choice.kind == kind and choice.layer is not None]
        scores = {n: run.scores.values[n] for n in units if n in run.scores.values} if run.scores else {}
        scores = {n: values for n, values in scores.items() if values.ndim == 1}
        unit = _unit_of_scores(run)
        drawings.append(_draw_widths(run, plan, kind))
        if scores:
            drawings += [_draw_score_map(run, kind, scores, unit), _draw_histogram(run, kind, scores, unit)]
    if distances := plan.settings.get(ALLOCATION, {}).get("distances"):
        drawings.append(_draw_search(run, distances))
    return drawings


def _draw_search(run: Run, distances: list[float]) -> Drawing:
    """Draw how close to the original the candidates of a search came, by generation."""
    with new_axes() as (figure, ax):
        ax.plot(range(len(distances)), distances, color=BLUE, drawstyle="steps-post")
        ax.set_xlabel("generation")
        ax.set_ylabel("distance from the original")
        ax.grid(True)
        ax.locator_params(axis="both", nbins=6)
        freeze_layout(figure)
    alt = f"distance from the original over {len(distances) - 1} generations: {distances[0]:.4g} to {distances[-1]:.4g}"
    return Drawing(slug(f"{run.name} search"), f"{run.name}: search for widths", alt, figure)


def _unit_of_scores(run: Run) -> str:
    settings = run.scores.settings if run.scores else {}
    return next((UNITS[value] for value in settings.values() if isinstance(value, str) and value in UNITS), "score")


def _draw_widths(run: Run, plan: PruningPlan, kind: str) -> Drawing:
    """Draw the units of every layer that stay, below those that go."""
    before, after = _widths(plan, kind)
    layers = sorted(before)
    width = 0.85 if len(layers) <= MOST_SEPARATE_BARS else 1.0
    with new_axes() as (figure, ax):
        title = f"{run.name}: {kind} kept in every layer"
        alt = f"{kind} by layer: {sum(after.values()):,} of {sum(before.values()):,} kept"
        drawing = Drawing(slug(f"{run.name} {kind} widths"), title, alt, figure)
        kept = ax.bar(layers, [after[i] for i in layers], color=BLUE, width=width, label="kept")
        removed = ax.bar(
            layers,
            [before[i] - after[i] for i in layers],
            bottom=[after[i] for i in layers],
            color=PALE,
            edgecolor="white",
            hatch="///",
            linewidth=0,
            width=width,
            label="removed",
        )
        for i, bar in zip(layers, kept, strict=True):
            drawing.tip(bar, f"layer {i}: {after[i]:,} of {before[i]:,} {kind} kept")
        ax.set_xlabel("layer")
        ax.set_ylabel(f"{kind} per layer")
        ax.set_xticks(layers[:: -(-len(layers) // LAYER_TICKS)])
        ax.locator_params(axis="y", nbins=7)
        add_legend(figure, [kept, removed])
        freeze_layout(figure)
    return drawing


def _widths(plan: PruningPlan, kind: str) -> tuple[dict[int, int], dict[int, int]]:
    """Return units by layer, before and after pruning."""
    before: dict[int, int] = defaultdict(int)
    after: dict[int, int] = defaultdict(int)
    for choice in plan.units.values():
        if choice.kind == kind and choice.layer is not None:
            before[choice.layer] += choice.size
            after[choice.layer] += choice.kept.numel()
    return before, after


def _log10(scores: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return logarithms of scores: of zeros that of the smallest other score, of indices removed before NaN."""
    values = scores.double().numpy().copy()
    positive = values[np.isfinite(values) & (values > 0)]
    smallest = positive.min() if positive.size else 1.0
    values[~np.isfinite(values)] = np.nan
    return np.log10(np.clip(values, smallest, None))


def _draw_score_map(run: Run, kind: str, scores: dict[str, torch.Tensor], unit: str) -> Drawing:
    """Draw the sorted scores of every layer: darker is lower, left of the line is removed."""
    from matplotlib.colors import LogNorm

    plan = cast(PruningPlan, run.plan)
    rows, cuts = [], []
    for name, values in scores.items():
        ordered = _log10(values.sort().values)  # sorted before the logarithm, which indices removed before lack
        rows.append(10 ** ordered[np.linspace(0, len(ordered) - 1, MAP_COLUMNS).round().astype(int)])
        cuts.append(1 - plan.units[name].kept.numel() / plan.units[name].size)
    low, high = _colour_limits(np.array(rows))
    with new_axes() as (figure, ax):
        title = f"{run.name}: scores of {kind} by layer"
        alt = f"{title}: a map of the sorted scores of every layer, with the line where they were cut"
        drawing = Drawing(slug(f"{run.name} {kind} scores"), title, alt, figure)
        image = ax.imshow(
            np.array(rows),
            aspect="auto",
            cmap="cividis",
            norm=LogNorm(low, high),
            extent=(0, 100, len(rows), 0),
            interpolation="none",
        )
        heights = np.repeat(np.arange(len(rows) + 1), 2)[1:-1]
        for colour, width in (("black", 3.5), ("white", 1.8)):
            ax.plot(np.repeat(cuts, 2) * 100, heights, color=colour, linewidth=width)
        _add_row_tips(ax, drawing, plan, dict(zip(scores, cuts, strict=True)))
        layers = [plan.units[name].layer for name in scores]
        step = -(-len(layers) // LAYER_TICKS)
        ax.set_yticks(np.arange(0, len(layers), step) + 0.5, [str(i) for i in layers[::step]])
        ax.set_xlabel(f"% of the layer's {kind}, lowest score first\n(left of the line: removed)")
        ax.set_ylabel("layer")
        _add_colour_bar(figure, ax, image, unit)
        freeze_layout(figure)
    return drawing


def _colour_limits(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return quantiles of the scores as the ends of the colours; different ones, also for equal scores."""
    finite = values[np.isfinite(values)]
    low, high = np.quantile(finite, MAP_QUANTILES) if finite.size else (1.0, 1.0)
    return (float(low), float(high)) if high > low * 1.01 else (float(low) / 2, float(high) * 2)


def _add_colour_bar(figure: Figure, ax: Any, image: Any, unit: str) -> None:
    """Add a colour bar with at most five numbers; pointed ends say that scores lie beyond."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    bar = figure.colorbar(image, ax=ax, extend="both", label=shorten(unit))
    low, high = image.norm.vmin, image.norm.vmax
    chosen = _round_numbers(low, high)
    chosen = chosen if len(chosen) > 1 else [low, float(np.sqrt(low * high)), high]
    bar.set_ticks(chosen)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _scientific(value)))
    cast(Any, bar.solids).set_rasterized(True)  # one picture instead of a path for each shade


def _round_numbers(low: float, high: float) -> list[float]:
    """Return at most five round numbers of a logarithmic range: powers of ten, with 2 and 5 where few lie in it.

    >>> _round_numbers(0.004, 0.09), _round_numbers(1, 1e7)
    ([0.005, 0.01, 0.02, 0.05], [1.0, 100.0, 10000.0, 1000000.0])
    """
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    factors = (1, 2, 5) if high < 40 * low else (1,)
    numbers = [float(f"{factor}e{power}") for power in powers for factor in factors]
    numbers = [number for number in numbers if low <= number <= high]
    return numbers[:: max(1, -(-len(numbers) // MOST_NUMBERS))]


def _scientific(value: float) -> str:
    """Return a positive number as people write it.

    >>> [_scientific(value) for value in (1e-6, 2e-5, 0.02, 300)]
    ['10⁻⁶', '2·10⁻⁵', '0.02', '300']
    """
    if 1e-2 <= value < 1e4:
        return f"{value:.2g}" if value < 100 else f"{value:,.0f}"
    digits, power = f"{value:.1e}".split("e")
    digits = digits.removesuffix(".0")
    factor = "" if digits == "1" else f"{digits}·"
    return f"{factor}10{str(int(power)).translate(SUPERSCRIPTS)}"


def _add_row_tips(ax: Any, drawing: Drawing, plan: PruningPlan, cuts: dict[str, float]) -> None:
    for i, (name, cut) in enumerate(cuts.items()):
        choice = plan.units[name]
        row = ax.fill([0, 100, 100, 0], [i, i, i + 1, i + 1], alpha=0)[0]
        margin = ""
        if choice.lowest_kept is not None and choice.highest_removed is not None:
            margin = f", kept from {choice.lowest_kept:.3g}, removed up to {choice.highest_removed:.3g}"
        drawing.tip(
            row, f"{name}: {choice.size - choice.kept.numel():,} of {choice.size:,} removed ({cut:.0%}){margin}"
        )


def _draw_histogram(run: Run, kind: str, scores: dict[str, torch.Tensor], unit: str) -> Drawing:
    """Draw the distributions of kept and removed scores, and the range of the layers' cuts."""
    from matplotlib.ticker import MaxNLocator

    plan = cast(PruningPlan, run.plan)
    kept, removed = _split_scores(plan, scores)
    with new_axes() as (figure, ax):
        title = f"{run.name}: scores of kept and removed {kind}"
        alt = f"{title}: a histogram of {kept.size:,} kept and {removed.size:,} removed"
        parts: Any = ax.hist(
            [removed, kept],
            bins=BINS,
            stacked=True,
            histtype="stepfilled",
            color=[ORANGE, BLUE],
            label=["removed", "kept"],
        )[2]
        parts[0][0].set_hatch("///")
        handles = [part[0] for part in parts]
        cuts = [c.lowest_kept for n in scores if (c := plan.units[n]).lowest_kept]
        if cuts and min(cuts) > 0:
            low, high = np.log10([min(cuts), max(cuts)])
            handles.append(ax.axvspan(low, high, color=GREY, alpha=0.3, label="cuts of the layers"))
            ax.axvline(float(np.median(np.log10(cuts))), color=GREY, linewidth=1.2)
        ticks = _round_numbers(*(10.0**edge for edge in ax.get_xlim()))
        ax.set_xticks([float(np.log10(tick)) for tick in ticks], [_scientific(tick) for tick in ticks])
        ax.set_xlabel(f"{unit} (logarithmic)")
        ax.set_ylabel(kind)
        ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        add_legend(figure, handles)
        freeze_layout(figure)
    return Drawing(slug(f"{run.name} {kind} histogram"), title, alt, figure)


def _split_scores(
    plan: PruningPlan, scores: dict[str, torch.Tensor]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the logarithms of kept and of removed scores."""
    sides: dict[bool, list[np.ndarray[Any, Any]]] = {True: [], False: []}
    for name, values in scores.items():
        stays = torch.zeros(plan.units[name].size, dtype=torch.bool)
        stays[plan.units[name].kept] = True
        logs = _log10(values)
        for side in sides:
            part = logs[(stays == side).numpy()]
            sides[side].append(part[np.isfinite(part)])
    return np.concatenate(sides[True]), np.concatenate(sides[False])

"""Draw the figures of a report with matplotlib, for the page and for papers."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from ..selection.plan import PruningPlan
from .runs import MeasuredModel, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart, and shapes for print in grey.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
STAGES = {"original": (BLUE, "s"), "pruned": (ORANGE, "o"), "recovered": (GREEN, "^"), "evaluated": (RED, "D")}
LINES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, ":"), (RED, "-."))
MAP_COLUMNS = 160  # of the sorted scores, which outnumber the dots of a page
BINS = 60
MODELS_IN_ALT = 12


@dataclass
class Drawing:
    """A figure, its description for readers who cannot see it, and its tooltips.

    Attributes:
        alt: description.
        tips: tooltip by the ``gid`` of the artist that it belongs to.
    """

    name: str
    title: str
    alt: str
    figure: Figure
    tips: dict[str, str] = field(default_factory=dict)

    def tip(self, artist: Any, text: str) -> None:
        """Give an artist a tooltip."""
        gid = f"tip{len(self.tips)}"
        artist.set_gid(gid)
        self.tips[gid] = text

    def write(self, to: Path | io.StringIO, form: str, **options: Any) -> None:
        """Write an image; the same figure gives the same bytes."""
        metadata = {"Title": self.title, **({"Date": None} if form == "svg" else {})}
        with _drawing_settings({"svg.hashsalt": self.name}):
            self.figure.savefig(to, format=form, metadata=metadata, **options)

    def svg(self) -> str:
        """Return an ``<svg>`` element for a page with others: its ids are unique, its text is text."""
        buffer = io.StringIO()
        with _drawing_settings({"svg.fonttype": "none"}):
            self.write(buffer, "svg", transparent=True)
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
        svg = re.sub(r"(?<=[ \"(]-|.[ \"(,])\d+\.\d{3,}", lambda number: f"{float(number[0]):.1f}", svg)
        svg = re.sub(r'(id="|url\(#|xlink:href="#)', rf"\g<1>{self.name}-", svg)
        for gid, text in self.tips.items():
            anchor = f'id="{self.name}-{gid}"'
            svg = svg.replace(f"{anchor}>", f'{anchor} class="tip"><title>{escape(text)}</title>', 1)
        box = re.search(r'viewBox="[^"]*"', svg)
        assert box is not None
        label = f'role="img" tabindex="0" aria-label="{escape(self.alt)}" xmlns:xlink="http://www.w3.org/1999/xlink"'
        width = f'style="max-width: {self.figure.get_figwidth():.1f}in"'
        return f'<svg class="figure" {label} {width} {box[0]}>' + svg[svg.index(">") + 1 :]


def _new_figure(**options: Any) -> Figure:
    """Make an empty figure. Only the extra ``report`` brings matplotlib, so functions import it, not the module."""
    from matplotlib.figure import Figure

    return Figure(**options)


def _drawing_settings(values: Any) -> AbstractContextManager[None]:
    """Return a block in which matplotlib draws with these settings."""
    import matplotlib

    return matplotlib.rc_context(values)


Measure = Callable[[MeasuredModel], float | None]
Point = tuple[float, float, MeasuredModel]  # size, quality, and the model that has them
SIZES: dict[str, Measure] = {
    "parameters, millions": lambda m: m.parameters / 1e6 if m.parameters else None,
    "multiply-accumulates, billions": lambda m: m.macs / 1e9 if m.macs else None,
    "latency, ms": lambda m: m.latency,
}


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A measure of quality, and its direction."""

    name: str
    of: Measure
    higher_is_better: bool


def draw_tradeoffs(models: list[MeasuredModel]) -> list[Drawing]:
    """Draw each measure of quality (perplexity of a text, accuracy) over each measure of size."""
    texts = dict.fromkeys(text for model in models for text in model.perplexity)
    qualities = [
        Quality(name=f"perplexity, {text}", of=partial(_perplexity_of, text), higher_is_better=False) for text in texts
    ]
    qualities.append(Quality(name="accuracy", of=lambda model: model.accuracy, higher_is_better=True))
    drawings: list[Drawing] = []
    for quality in qualities:
        panels = {name: _points(models, size, quality.of) for name, size in SIZES.items()}
        panels = {name: points for name, points in panels.items() if len({size for size, _, _ in points}) > 1}
        if panels:
            drawings.append(_draw_tradeoff(quality, panels, f"tradeoff{len(drawings)}"))
    return drawings


def _perplexity_of(text: str, model: MeasuredModel) -> float | None:
    return model.perplexity.get(text)


def _points(models: list[MeasuredModel], size: Measure, quality: Measure) -> list[Point]:
    return [(x, y, m) for m in models if (x := size(m)) is not None and (y := quality(m)) is not None]


def _draw_tradeoff(quality: Quality, panels: dict[str, list[Point]], name: str) -> Drawing:
    """Draw one measure of quality, with a panel for each measure of size."""
    figure = _new_figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    drawing = Drawing(name, f"{quality.name}, and its cost", "", figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (size, points) in zip(axes, panels.items(), strict=True):
        _draw_panel(ax, drawing, quality, size, points)
    present = {model.stage for points in panels.values() for _, _, model in points}
    shown = [stage for stage in STAGES if stage in present]
    handles = [axes[0].scatter([], [], color=STAGES[s][0], marker=STAGES[s][1], label=s) for s in shown]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(shown), frameon=False)
    first = next(iter(panels.values()))
    listed = "; ".join(f"{model.model} {y:.4g} at {x:,.5g}" for x, y, model in first[:MODELS_IN_ALT])
    drawing.alt = f"{quality.name} over {', '.join(panels)}. {listed}"
    return drawing


def _draw_panel(ax: Any, drawing: Drawing, quality: Quality, size: str, points: list[Point]) -> None:
    for x, y, model in points:
        colour, marker = STAGES[model.stage]
        dot = ax.scatter([x], [y], color=colour, marker=marker, s=36, zorder=3)
        drawing.tip(dot, f"{model.model} ({model.stage}): {quality.name} {y:.4g}, {size} {x:,.5g}")
    front = frontier([(x, y) for x, y, _ in points], quality.higher_is_better)
    ax.plot(*zip(*front, strict=True), color="#888888", linewidth=1, drawstyle="steps-post", zorder=1)
    ax.set_xlabel(size)
    ax.set_ylabel(quality.name)
    values = [y for _, y, _ in points]
    if not quality.higher_is_better and max(values) > 10 * min(values):
        ax.set_yscale("log")
    ax.grid(alpha=0.3)


def frontier(points: list[tuple[float, float]], higher: bool) -> list[tuple[float, float]]:
    """Return the points that no other beats in both: from the smallest size, each better than all smaller ones.

    >>> frontier([(3, 10), (1, 30), (2, 40), (5, 5)], higher=False)
    [(1, 30), (3, 10), (5, 5)]
    """
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1] if higher else p[1])):
        if not front or (y > front[-1][1] if higher else y < front[-1][1]):
            front.append((x, y))
    return front


def draw_recoveries(runs: list[Run]) -> list[Drawing]:
    """Draw the losses of each recovery over its steps."""
    drawings = []
    for i, run in enumerate(runs):
        losses = {n: points for n, points in run.curves.items() if (n == "loss" or n.endswith("_loss")) and points}
        if losses:
            drawings.append(_draw_recovery(run, losses, f"recovery{i}"))
    return drawings


def _draw_recovery(run: Run, losses: dict[str, list[tuple[float, float]]], name: str) -> Drawing:
    figure = _new_figure(figsize=(6.4, 3.2), layout="constrained")
    ax = figure.subplots()
    descriptions = []
    for i, (loss, points) in enumerate(losses.items()):
        label = "training" if loss == "loss" else loss.removeprefix("eval_").removesuffix("_loss")
        colour, line = LINES[i % len(LINES)]
        ax.plot(*zip(*points, strict=True), line, color=colour, label=label, marker="." if i else None)
        descriptions.append(f"{label} from {points[0][1]:.3f} to {points[-1][1]:.3f}")
    ax.set_xlabel("step")
    ax.set_ylabel("loss, nats per token")
    ax.legend(frameon=False)
    ax.grid(alpha=0.3)
    alt = f"losses of {run.name} over its steps: {'; '.join(descriptions)}"
    return Drawing(name, f"recovery of {run.name}", alt, figure)


def draw_pruning(run: Run, key: str) -> list[Drawing]:
    """Draw, for each kind of unit, its widths by layer and, if scores are known, their map and their histogram."""
    plan = run.plan
    if plan is None:
        return []
    kinds = dict.fromkeys(choice.kind for choice in plan.units.values() if choice.layer is not None)
    return [_draw_kind(run, plan, kind, f"{key}{kind}") for kind in kinds]


def _draw_kind(run: Run, plan: PruningPlan, kind: str, name: str) -> Drawing:
    units = [n for n, choice in plan.units.items() if choice.kind == kind and choice.layer is not None]
    scores = {n: run.scores.values[n] for n in units if n in run.scores.values} if run.scores else {}
    # Placed by hand: constrained layout takes most of the time of a page with many runs.
    figure = _new_figure(figsize=(11, 3.2) if scores else (5, 3.2))
    sides = {"left": 0.06, "right": 0.985, "wspace": 0.42} if scores else {"left": 0.14, "right": 0.97}
    figure.subplots_adjust(bottom=0.16, top=0.95, **sides)
    drawing = Drawing(name, f"{run.name}: {kind}", "", figure)
    axes = figure.subplots(1, 3 if scores else 1, squeeze=False)[0]
    _draw_widths(axes[0], drawing, plan, kind)
    if scores:
        _draw_score_map(axes[1], drawing, plan, scores)
        _draw_histogram(axes[2], plan, scores)
        maps = "a map of the sorted scores of every layer with the cut; a histogram of kept and removed scores"
        drawing.alt += f"; {maps}"
    return drawing


def _draw_widths(ax: Any, drawing: Drawing, plan: PruningPlan, kind: str) -> None:
    before, after = _widths(plan, kind)
    layers = sorted(before)
    ax.bar(layers, [before[i] for i in layers], color="#BBBBBB", width=0.9)
    for i, bar in zip(layers, ax.bar(layers, [after[i] for i in layers], color=BLUE, width=0.9), strict=True):
        drawing.tip(bar, f"layer {i}: {after[i]:,} of {before[i]:,} {kind} kept")
    ax.set_xlabel("layer")
    ax.set_ylabel(f"{kind} (grey: before)")
    drawing.alt = f"{kind} by layer: {sum(after.values()):,} of {sum(before.values()):,} kept"


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


def _draw_score_map(ax: Any, drawing: Drawing, plan: PruningPlan, scores: dict[str, torch.Tensor]) -> None:
    """Draw the sorted scores of every layer: darker is lower, left of the line is removed."""
    rows, cuts = [], []
    for name, values in scores.items():
        ordered = _log10(values.sort().values)  # sorted before the logarithm, which indices removed before lack
        at = np.linspace(0, len(ordered) - 1, MAP_COLUMNS).round().astype(int)
        rows.append(ordered[at])
        cuts.append(1 - plan.units[name].kept.numel() / plan.units[name].size)
    image = ax.imshow(np.array(rows), aspect="auto", cmap="cividis", extent=(0, 1, len(rows), 0), interpolation="none")
    heights = np.repeat(np.arange(len(rows) + 1), 2)[1:-1]
    ax.plot(np.repeat(cuts, 2), heights, color="white", linewidth=1.5)
    for i, (name, cut) in enumerate(zip(scores, cuts, strict=True)):
        choice = plan.units[name]
        row = ax.fill([0, 1, 1, 0], [i, i, i + 1, i + 1], alpha=0)[0]
        margin = ""
        if choice.lowest_kept is not None and choice.highest_removed is not None:
            margin = f", kept from {choice.lowest_kept:.3g}, removed up to {choice.highest_removed:.3g}"
        drawing.tip(
            row, f"{name}: {choice.size - choice.kept.numel():,} of {choice.size:,} removed ({cut:.0%}){margin}"
        )
    layers = [plan.units[name].layer for name in scores]
    step = max(1, len(layers) // 8)
    ax.set_yticks(np.arange(0, len(layers), step) + 0.5, [str(i) for i in layers[::step]])
    ax.set_xlabel("units, by score (left of the line: removed)")
    ax.set_ylabel("layer")
    bar = drawing.figure.colorbar(image, ax=ax, label="score, log10")
    cast(Any, bar.solids).set_rasterized(True)  # one picture instead of a path for each shade


def _draw_histogram(ax: Any, plan: PruningPlan, scores: dict[str, torch.Tensor]) -> None:
    """Draw the distributions of kept and removed scores, and the range of the layers' cuts."""
    sides: dict[bool, list[np.ndarray[Any, Any]]] = {True: [], False: []}
    for name, values in scores.items():
        stays = torch.zeros(plan.units[name].size, dtype=torch.bool)
        stays[plan.units[name].kept] = True
        logs = _log10(values)
        for side in sides:
            part = logs[(stays == side).numpy()]
            sides[side].append(part[np.isfinite(part)])
    kept, removed = np.concatenate(sides[True]), np.concatenate(sides[False])
    ax.hist(
        [removed, kept], bins=BINS, stacked=True, histtype="stepfilled", color=[ORANGE, BLUE], label=["removed", "kept"]
    )
    cuts = [c.lowest_kept for n in scores if (c := plan.units[n]).lowest_kept]
    if cuts and min(cuts) > 0:
        low, high = np.log10([min(cuts), max(cuts)])
        ax.axvspan(low, high, color="#888888", alpha=0.25, label="cuts of the layers")
        ax.axvline(float(np.median(np.log10(cuts))), color="#555555", linewidth=1)
    ax.set_xlabel("score, log10")
    ax.set_ylabel("units")
    ax.legend(frameon=False)

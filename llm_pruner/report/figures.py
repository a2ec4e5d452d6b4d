"""The figures of a report, by matplotlib: the same for the page and for a paper."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from ..importance.scores import Scores
from ..selection.plan import PruningPlan
from .runs import MeasuredModel, Run

# Okabe and Ito's colours, which those who do not see some colours tell apart, and shapes for print without any.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
STAGES = {"original": (BLUE, "s"), "pruned": (ORANGE, "o"), "recovered": (GREEN, "^"), "evaluated": (RED, "D")}
LINES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, ":"), (RED, "-."))
COLUMNS = 160  # of a heat map: scores are sorted, and there are more of them than dots on a page
BINS = 60


@dataclass
class Drawing:
    """A figure, what it shows for those who cannot see it, and what is said under the pointer.

    Attributes:
        tips: text by the ``gid`` of what it belongs to.
    """

    name: str
    title: str
    alt: str
    figure: Figure
    tips: dict[str, str] = field(default_factory=dict)

    def tip(self, artist: Any, text: str) -> None:
        gid = f"tip{len(self.tips)}"
        artist.set_gid(gid)
        self.tips[gid] = text

    def write(self, to: Path | io.StringIO, form: str, **how: Any) -> None:
        """Write an image: the same figure gives the same bytes."""
        about = {"Title": self.title, **({"Date": None} if form == "svg" else {})}
        with matplotlib.rc_context({"svg.hashsalt": self.name}):
            self.figure.savefig(to, format=form, metadata=about, **how)

    def svg(self) -> str:
        """An ``<svg>`` element to stand in a page beside others: ids are its own, text is text."""
        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none"}):
            self.write(buffer, "svg", transparent=True)
        out = buffer.getvalue()
        out = out[out.index("<svg") :]
        out = re.sub(r"<metadata>.*?</metadata>", "", out, flags=re.S)
        out = re.sub(r"(?<=[ \"(]-|.[ \"(,])\d+\.\d{3,}", lambda number: f"{float(number[0]):.1f}", out)
        out = re.sub(r'(id="|url\(#|xlink:href="#)', rf"\g<1>{self.name}-", out)
        for gid, text in self.tips.items():
            anchor = f'id="{self.name}-{gid}"'
            out = out.replace(f"{anchor}>", f'{anchor} class="tip"><title>{escape(text)}</title>', 1)
        box = re.search(r'viewBox="[^"]*"', out)
        assert box is not None
        label = f'role="img" tabindex="0" aria-label="{escape(self.alt)}" xmlns:xlink="http://www.w3.org/1999/xlink"'
        width = f'style="max-width: {self.figure.get_figwidth():.1f}in"'
        return f'<svg class="figure" {label} {width} {box[0]}>' + out[out.index(">") + 1 :]


def tradeoffs(points: list[MeasuredModel]) -> list[Drawing]:
    """What every measure of quality costs: perplexity of each text, and accuracy, over each measure of size."""
    sizes: list[tuple[str, Callable[[MeasuredModel], float | None]]] = [
        ("parameters, millions", lambda p: p.parameters / 1e6 if p.parameters else None),
        ("multiply-accumulates, billions", lambda p: p.macs / 1e9 if p.macs else None),
        ("latency, ms", lambda p: p.latency),
    ]
    texts = dict.fromkeys(text for p in points for text in p.perplexity)
    qualities: list[tuple[str, bool, Callable[[MeasuredModel], float | None]]] = [
        (f"perplexity, {text}", False, lambda p, t=text: p.perplexity.get(t))  # type: ignore[misc]
        for text in texts
    ]
    qualities.append(("accuracy", True, lambda p: p.accuracy))
    out: list[Drawing] = []
    for what, higher, quality in qualities:
        panels = []
        for name, size in sizes:
            known = [(x, y, p) for p in points if (x := size(p)) is not None and (y := quality(p)) is not None]
            if len({x for x, _, _ in known}) > 1:
                panels.append((name, known))
        if not panels:
            continue
        figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
        drawing = Drawing(f"tradeoff{len(out)}", f"{what}, and what it costs", "", figure)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, (name, known) in zip(axes, panels, strict=True):
            for stage, (colour, marker) in STAGES.items():
                for x, y, point in known:
                    if point.stage == stage:
                        dot = ax.scatter([x], [y], color=colour, marker=marker, s=36, zorder=3)
                        drawing.tip(dot, f"{point.model} ({stage}): {what} {y:.4g}, {name} {x:,.5g}")
            front = frontier([(x, y) for x, y, _ in known], higher)
            ax.plot(*zip(*front, strict=True), color="#888888", linewidth=1, drawstyle="steps-post", zorder=1)
            ax.set_xlabel(name)
            ax.set_ylabel(what)
            if not higher and max(y for _, y, _ in known) > 10 * min(y for _, y, _ in known):
                ax.set_yscale("log")
            ax.grid(alpha=0.3)
        shown = [s for s in STAGES if any(p.stage == s for _, known in panels for _, _, p in known)]
        handles = [axes[0].scatter([], [], color=STAGES[s][0], marker=STAGES[s][1], label=s) for s in shown]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(shown), frameon=False)
        listed = "; ".join(f"{p.model} {y:.4g} at {x:,.5g}" for x, y, p in panels[0][1][:12])
        drawing.alt = f"{what} over {', '.join(name for name, _ in panels)}. {listed}"
        out.append(drawing)
    return out


def frontier(points: list[tuple[float, float]], higher: bool) -> list[tuple[float, float]]:
    """The points that no other beats in both: from the smallest on, each better than all smaller ones."""
    out: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1] if higher else p[1])):
        if not out or (y > out[-1][1] if higher else y < out[-1][1]):
            out.append((x, y))
    return out


def recoveries(runs: list[Run]) -> list[Drawing]:
    """The losses of each recovery over its steps."""
    out = []
    for i, run in enumerate(runs):
        losses = {n: points for n, points in run.curves.items() if (n == "loss" or n.endswith("_loss")) and points}
        if not losses:
            continue
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        drawing = Drawing(f"recovery{i}", f"recovery of {run.name}", "", figure)
        ax = figure.subplots()
        said = []
        for j, (name, points) in enumerate(losses.items()):
            label = "training" if name == "loss" else name.removeprefix("eval_").removesuffix("_loss")
            colour, line = LINES[j % len(LINES)]
            ax.plot(*zip(*points, strict=True), line, color=colour, label=label, marker="." if j else None)
            said.append(f"{label} from {points[0][1]:.3f} to {points[-1][1]:.3f}")
        ax.set_xlabel("step")
        ax.set_ylabel("loss, nats per token")
        ax.legend(frameon=False)
        ax.grid(alpha=0.3)
        drawing.alt = f"losses of {run.name} over its steps: {'; '.join(said)}"
        out.append(drawing)
    return out


def pruning(run: Run, key: str) -> list[Drawing]:
    """Of a pruning: for each kind of unit its widths, and where scores are known their map and where they were cut."""
    plan = run.plan
    if plan is None:
        return []
    return [
        _pruning(plan, run.scores, kind, f"{key}{kind}", run.name)
        for kind in dict.fromkeys(c.kind for c in plan.units.values())
        if any(c.layer is not None for c in plan.units.values() if c.kind == kind)
    ]


def _pruning(plan: PruningPlan, scores: Scores | None, kind: str, name: str, title: str) -> Drawing:
    units = {n: c for n, c in plan.units.items() if c.kind == kind and c.layer is not None}
    known = {n: scores.values[n] for n in units if n in scores.values} if scores else {}
    # Placed by hand: to have it worked out takes most of the time of a page with many runs.
    figure = Figure(figsize=(11, 3.2) if known else (5, 3.2))
    sides = {"left": 0.06, "right": 0.985, "wspace": 0.42} if known else {"left": 0.14, "right": 0.97}
    figure.subplots_adjust(bottom=0.16, top=0.95, **sides)
    drawing = Drawing(name, f"{title}: {kind}", "", figure)
    axes = figure.subplots(1, 3 if known else 1, squeeze=False)[0]
    before, after = _widths(plan, kind)
    layers = sorted(before)
    axes[0].bar(layers, [before[i] for i in layers], color="#BBBBBB", width=0.9)
    for i, bar in zip(layers, axes[0].bar(layers, [after[i] for i in layers], color=BLUE, width=0.9), strict=True):
        drawing.tip(bar, f"layer {i}: {after[i]:,} of {before[i]:,} {kind} kept")
    axes[0].set_xlabel("layer")
    axes[0].set_ylabel(f"{kind} (grey: before)")
    kept, total = sum(after.values()), sum(before.values())
    drawing.alt = f"{kind} by layer: {kept:,} of {total:,} kept"
    if known:
        _map(axes[1], drawing, plan, known)
        _cut(axes[2], plan, known)
        drawing.alt += (
            "; a map of the sorted scores of every layer with the cut; a histogram of kept and removed scores"
        )
    return drawing


def _widths(plan: PruningPlan, kind: str) -> tuple[dict[int, int], dict[int, int]]:
    before: dict[int, int] = defaultdict(int)
    after: dict[int, int] = defaultdict(int)
    for choice in plan.units.values():
        if choice.kind == kind and choice.layer is not None:
            before[choice.layer] += choice.size
            after[choice.layer] += choice.kept.numel()
    return before, after


def _logs(scores: torch.Tensor) -> np.ndarray[Any, Any]:
    """Logarithms of scores; zeros count as the least of the others, what an earlier step took away as nothing."""
    values = scores.double().numpy().copy()
    positive = values[np.isfinite(values) & (values > 0)]
    least = positive.min() if positive.size else 1.0
    values[~np.isfinite(values)] = np.nan
    return np.log10(np.clip(values, least, None))


def _map(ax: Any, drawing: Drawing, plan: PruningPlan, known: dict[str, torch.Tensor]) -> None:
    """Layer by unit, sorted: darker is less, and what lies left of the line went."""
    rows, cuts = [], []
    for name, scores in known.items():
        ordered = _logs(scores.sort().values)  # by scores: what went first is first, though it has no logarithm
        at = np.linspace(0, len(ordered) - 1, COLUMNS).round().astype(int)
        rows.append(ordered[at])
        cuts.append(1 - plan.units[name].kept.numel() / plan.units[name].size)
    image = ax.imshow(np.array(rows), aspect="auto", cmap="cividis", extent=(0, 1, len(rows), 0), interpolation="none")
    heights = np.repeat(np.arange(len(rows) + 1), 2)[1:-1]
    ax.plot(np.repeat(cuts, 2), heights, color="white", linewidth=1.5)
    for i, (name, cut) in enumerate(zip(known, cuts, strict=True)):
        choice = plan.units[name]
        row = ax.fill([0, 1, 1, 0], [i, i, i + 1, i + 1], alpha=0)[0]
        margin = ""
        if choice.lowest_kept is not None and choice.highest_removed is not None:
            margin = f", kept from {choice.lowest_kept:.3g}, removed up to {choice.highest_removed:.3g}"
        drawing.tip(
            row, f"{name}: {choice.size - choice.kept.numel():,} of {choice.size:,} removed ({cut:.0%}){margin}"
        )
    layers = [plan.units[name].layer for name in known]
    step = max(1, len(layers) // 8)
    ax.set_yticks(np.arange(0, len(layers), step) + 0.5, [str(i) for i in layers[::step]])
    ax.set_xlabel("units, by score (left of the line: removed)")
    ax.set_ylabel("layer")
    bar = drawing.figure.colorbar(image, ax=ax, label="score, log10")
    cast(Any, bar.solids).set_rasterized(True)  # one picture instead of a path for each shade


def _cut(ax: Any, plan: PruningPlan, known: dict[str, torch.Tensor]) -> None:
    """How the scores of what stays and of what goes lie."""
    sides: dict[bool, list[np.ndarray[Any, Any]]] = {True: [], False: []}
    for name, scores in known.items():
        stays = torch.zeros(plan.units[name].size, dtype=torch.bool)
        stays[plan.units[name].kept] = True
        logs = _logs(scores)
        for side in sides:
            part = logs[(stays == side).numpy()]
            sides[side].append(part[np.isfinite(part)])
    kept, gone = np.concatenate(sides[True]), np.concatenate(sides[False])
    ax.hist(
        [gone, kept], bins=BINS, stacked=True, histtype="stepfilled", color=[ORANGE, BLUE], label=["removed", "kept"]
    )
    cuts = [c.lowest_kept for n in known if (c := plan.units[n]).lowest_kept]
    if cuts and min(cuts) > 0:
        low, high = np.log10([min(cuts), max(cuts)])
        ax.axvspan(low, high, color="#888888", alpha=0.25, label="cuts of the layers")
        ax.axvline(float(np.median(np.log10(cuts))), color="#555555", linewidth=1)
    ax.set_xlabel("score, log10")
    ax.set_ylabel("units")
    ax.legend(frameon=False)

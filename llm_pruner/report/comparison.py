"""Compare every model with the original: one table of all qualities, one by task, and one figure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..evaluation.notes import explain_difference
from ..evaluation.paired import MEAN, Comparison, Interval, compare_questions, mean_accuracy
from ..evaluation.tabular import short_percent, short_score, shorten
from .drawing import COLOURS, GREY, Drawing, add_legend, bar_axes, freeze_layout
from .models import ORIGINAL
from .runs import MeasuredModel

Cells = list[str]
MOST_BARS = 6  # models in the figure
MOST_TASKS = 12  # tasks in the figure, beside their mean
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")
THICKNESS = 0.8  # of the bars of a group, of the distance between groups


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Qualities of models beside the original's.

    Attributes:
        heads, rows: table of all models, the original first.
        task_heads, task_rows: table of models and tasks.
        notes: sentences that say which differences are real.
        drawing: all of it as bars; None where there is nothing to compare.
    """

    heads: Cells
    rows: list[Cells]
    task_heads: Cells
    task_rows: list[Cells]
    notes: list[str]
    drawing: Drawing | None


@dataclass(frozen=True, kw_only=True)
class _Bar:
    """Bar of a model in a group of bars."""

    group: str
    model: int
    value: float
    interval: Interval | None = None


def compare_models(models: Sequence[MeasuredModel]) -> Quality | None:
    """Compare models with the original, or with the first one where none is an original.

    Returns:
        None if fewer than two models have a quality to compare.
    """
    measured = [model for model in models if model.questions or model.kl or model.byte_perplexity]
    first = next((model for model in measured if model.stage == ORIGINAL), measured[0] if measured else None)
    if first is None or len(measured) < 2:
        return None
    measured = [_kl_to(first.model, model) for model in (first, *(one for one in measured if one is not first))]
    comparisons = [{}, *(compare_questions(first.questions, model.questions) for model in measured[1:])]
    heads, rows = _table(measured, comparisons)
    pairs = list(zip(measured, comparisons, strict=True))
    task_rows = [row for model, comparison in pairs for row in _task_rows(model, comparison)]
    notes = [explain_difference(model.name, first.name, comparison) for model, comparison in pairs if comparison]
    for before, model in _steps(measured):
        if comparison := compare_questions(before.questions, model.questions):
            notes.append(explain_difference(model.name, before.name, comparison))
    return Quality(
        heads=heads,
        rows=rows,
        task_heads=["model", "task", "questions", "original %", "accuracy %", *KEPT],
        task_rows=task_rows,
        notes=notes,
        drawing=_draw(measured, comparisons),
    )


def _kl_to(reference: str, model: MeasuredModel) -> MeasuredModel:
    """Return a model without divergences from other models than the original."""
    return replace(model, kl={text: kl for text, kl in model.kl.items() if kl[2] == reference})


def _steps(models: Sequence[MeasuredModel]) -> list[tuple[MeasuredModel, MeasuredModel]]:
    """Return each model with the one that it was made from; where no run says so, with the one before it."""
    others = models[1:]
    if not any(model.parent for model in others):
        return list(itertools.pairwise(others[:MOST_BARS]))
    return [(one, other) for other in others for one in others if one.model == other.parent]


def _with_interval(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return f"{short_percent(interval.value)} [{short_percent(interval.low)}, {short_percent(interval.high)}]"


# Columns of a comparison.
KEPT: dict[str, Callable[[Comparison], str]] = {
    "kept %": lambda one: _with_interval(one.retention),
    "difference, points": lambda one: _with_interval(one.difference),
    "real": lambda one: "yes" if one.is_real else "no",
    "same answers %": lambda one: short_percent(one.agreement),
}


def _table(
    models: Sequence[MeasuredModel], comparisons: Sequence[Mapping[str, Comparison]]
) -> tuple[Cells, list[Cells]]:
    """Return heads and rows of the table of models, without empty columns."""
    columns: dict[str, Cells] = {"model": [model.name for model in models]}
    for text in dict.fromkeys(text for model in models for text in model.byte_perplexity):
        values = [model.byte_perplexity.get(text) for model in models]
        columns[f"ppl/byte {text}"] = ["" if value is None else f"{value:.3f}" for value in values]
    for text in dict.fromkeys(text for model in models for text in model.kl):
        divergences = [model.kl.get(text) for model in models]
        columns[f"KL {text}, nats/token"] = [_with_error(one and one[:2], "{:.3f}".format) for one in divergences]
    accuracies = [mean_accuracy(model.questions) if model.questions else None for model in models]
    several = any(len(model.questions) > 1 for model in models)
    columns["mean accuracy %" if several else "accuracy %"] = [_with_error(one, short_percent) for one in accuracies]
    for head, show in KEPT.items():
        columns[head] = [show(next(iter(one.values()))) if one else "" for one in comparisons]
    columns["repeats %"] = [short_percent(m.generation["repetition"]) if m.generation else "" for m in models]
    columns["length, tokens"] = [short_score(m.generation["tokens"]) if m.generation else "" for m in models]
    columns = {head: cells for head, cells in columns.items() if any(cells)}
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _with_error(value: tuple[float, float | None] | None, show: Callable[[float], str]) -> str:
    if value is None:
        return ""
    return show(value[0]) + ("" if value[1] is None else f" ± {show(value[1])}")


def _task_rows(model: MeasuredModel, comparison: Mapping[str, Comparison]) -> list[Cells]:
    return [
        [
            model.name,
            task,
            f"{one.questions:,}",
            short_percent(one.original),
            f"{short_percent(one.accuracy)} ± {short_percent(one.error)}",
            *(show(one) for show in KEPT.values()),
        ]
        for task, one in comparison.items()
    ]


def _draw(models: Sequence[MeasuredModel], comparisons: Sequence[Mapping[str, Comparison]]) -> Drawing | None:
    """Draw, in percent of the original, what models kept, and in nats, how far they are from it."""
    models, comparisons = models[: MOST_BARS + 1], comparisons[: MOST_BARS + 1]
    shares, distances = _bars_of_shares(comparisons), _bars_of_distances(models)
    panels = [(bars, label) for bars, label in ((shares, "% of the original's"), (distances, "nats")) if bars]
    if not panels:
        return None
    drawn = sorted({bar.model for bars, _ in panels for bar in bars})
    with bar_axes([len({bar.group for bar in bars}) for bars, _ in panels], len(drawn)) as (figure, axes):
        drawing = Drawing("quality-against-the-original", "Quality beside the original's", "", figure)
        handles = [_draw_bars(ax, drawing, bars, models, drawn) for ax, (bars, _) in zip(axes, panels, strict=True)]
        for ax, (bars, label) in zip(axes, panels, strict=True):
            ax.set_xlabel(label)
            ax.grid(True, axis="x")
            if bars is shares:
                ax.axvline(100, color=GREY, linewidth=1.4, linestyle=(0, (4, 2)))
            else:
                ax.set_xlim(left=0)
            ax.locator_params(axis="x", nbins=6)
        legend = {model: handle for of_panel in handles for model, handle in of_panel.items()}
        add_legend(figure, [legend[model] for model in sorted(legend)])
        freeze_layout(figure)
    described = [f"{models[b.model].name}, {b.group}: {b.value:.3g}" for bars, _ in panels for b in bars]
    drawing.alt = f"{drawing.title}: {'; '.join(described)}"
    return drawing


def _bars_of_shares(comparisons: Sequence[Mapping[str, Comparison]]) -> list[_Bar]:
    bars = []
    for i, comparison in enumerate(comparisons):
        for task, one in list(comparison.items())[: MOST_TASKS + 1]:
            if one.retention is not None:
                name = "mean of the tasks" if task == MEAN else task
                bars.append(_Bar(group=f"{name}, kept", model=i, value=one.retention.value, interval=one.retention))
        if comparison:
            bars.append(_Bar(group="same answers", model=i, value=next(iter(comparison.values())).agreement))
    return [_in_percent(bar) for bar in bars]


def _in_percent(bar: _Bar) -> _Bar:
    interval = bar.interval and Interval(**{name: 100 * bound for name, bound in vars(bar.interval).items()})
    return _Bar(group=bar.group, model=bar.model, value=100 * bar.value, interval=interval)


def _bars_of_distances(models: Sequence[MeasuredModel]) -> list[_Bar]:
    """Return KL per token and loss per byte, both in nats."""
    bars = []
    for i, model in enumerate(models):
        for text, (value, error, _) in model.kl.items():
            spread = 1.96 * (error or 0.0)
            interval = Interval(value=value, low=value - spread, high=value + spread) if error else None
            bars.append(_Bar(group=f"KL per token, {_text(text)}", model=i, value=value, interval=interval))
    for i, model in enumerate(models):
        for text, loss in model.byte_losses().items():
            bars.append(_Bar(group=f"loss per byte, {_text(text)}", model=i, value=loss))
    return bars


def _text(name: str) -> str:
    return shorten(name.partition(",")[0], 16)


def _draw_bars(
    ax: Any, drawing: Drawing, bars: Sequence[_Bar], models: Sequence[MeasuredModel], drawn: Sequence[int]
) -> dict[int, Any]:
    """Draw groups of horizontal bars from the top; return the legend's handle of each model."""
    groups = list(dict.fromkeys(bar.group for bar in bars))
    height, handles = THICKNESS / len(drawn), {}
    for bar in bars:
        members = [one.model for one in bars if one.group == bar.group]
        place = groups.index(bar.group) + height * (members.index(bar.model) - (len(members) - 1) / 2)
        colour = GREY if bar.model == 0 else COLOURS[(bar.model - 1) % len(COLOURS)]
        interval = bar.interval
        container = ax.barh(
            [place],
            [bar.value],
            height=height,
            color=colour,
            edgecolor="white",
            hatch=HATCHES[bar.model],
            xerr=None if interval is None else [[bar.value - interval.low], [interval.high - bar.value]],
            error_kw={"elinewidth": 1.2, "capsize": 2},
            label=shorten(models[bar.model].name),
        )
        bounds = "" if interval is None else f" [{interval.low:.3g}, {interval.high:.3g}]"
        drawing.tip(container[0], f"{models[bar.model].name}, {bar.group}: {bar.value:.3g}{bounds}")
        handles[bar.model] = container
    ax.set_yticks(range(len(groups)), groups)
    ax.invert_yaxis()
    return handles

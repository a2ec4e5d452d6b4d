"""Tabulate the models of a report: every model once, with all its measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..evaluation.tabular import short_bytes, short_number, short_percent, short_score
from .runs import MeasuredModel

Cell = tuple[str, float | str]  # text to show, value to sort by
Measure = Callable[[MeasuredModel], float | None]


def summarize(models: Sequence[MeasuredModel]) -> dict[str, list[Cell]]:
    """Return the columns of the table by their heads, without empty ones."""
    largest = max((model.parameters or 0 for model in models), default=0)
    numbers: dict[str, tuple[Callable[[float], str], Measure]] = {
        "params": (lambda n: short_number(n, giga="B"), lambda m: m.parameters),
        "of the largest": ("{:.3f}".format, lambda m: m.parameters / largest if m.parameters else None),
        "MACs": (short_number, lambda m: m.macs),
        "weights": (short_bytes, lambda m: m.weight_bytes),
    }
    for what in dict.fromkeys(speed for model in models for speed in model.speeds):
        numbers[f"tok/s, {what}"] = (short_score, lambda m, w=what: m.speeds.get(w))  # type: ignore[misc]
    for text in dict.fromkeys(text for model in models for text in model.perplexity):
        numbers[f"ppl {text}"] = (short_score, lambda m, t=text: m.perplexity.get(t))  # type: ignore[misc]
    columns: dict[str, list[Cell]] = {
        "model": [(model.name, model.name) for model in models],
        "stage": [(model.stage, model.stage) for model in models],
        "method": [(model.method, model.method) for model in models],
        "ratio": [(model.size, model.size) for model in models],
    }
    columns = {head: cells for head, cells in columns.items() if any(text for text, _ in cells)}
    for head, (show, number_of) in numbers.items():
        values = [number_of(model) for model in models]
        if any(value is not None for value in values):
            columns[head] = [("", float("inf")) if value is None else (show(value), value) for value in values]
    if any(model.accuracy is not None for model in models):
        columns["accuracy, %"] = [_accuracy(model) for model in models]
    return columns


def _accuracy(model: MeasuredModel) -> Cell:
    """Return the accuracy in percent with its standard error."""
    if model.accuracy is None:
        return "", float("inf")
    error = "" if model.accuracy_error is None else f" ± {short_percent(model.accuracy_error)}"
    return short_percent(model.accuracy) + error, model.accuracy

"""Tabulate the measurements of several models: for the terminal, CSV, Markdown, LaTeX and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table as TerminalTable

from ..files import strict_json
from .evaluate import Evaluation

SPECIAL = str.maketrans({c: f"\\{c}" for c in "_%&#$"})


@dataclass(frozen=True)
class Table:
    """Rows of numbers, one column per model.

    Attributes:
        models: heads of the columns.
        rows: name, format and one value per model.
        notes: sentences below the table.
    """

    models: list[str]
    rows: list[tuple[str, str, list[float | None]]]
    notes: list[str]

    def cells(self) -> list[list[str]]:
        """Return the table as text, head first; every model after the first also shows its ratio to the first."""
        return [["", *self.models], *([name, *_format(values, form)] for name, form, values in self.rows)]

    def csv(self) -> str:
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        writer.writerow(["", *self.models])
        for name, _, values in self.rows:
            writer.writerow([name, *("" if value is None else value for value in values)])
        return buffer.getvalue()

    def markdown(self) -> str:
        return "\n".join([markdown(self.cells()), *(f"{note}\n" for note in self.notes)])

    def latex(self) -> str:
        return latex(self.cells())


def _format(values: list[float | None], form: str) -> list[str]:
    first, *others = values
    texts = ["" if value is None else form.format(value) for value in values]
    ratios = [f" ({value / first:.3f})" if value is not None and first else "" for value in others]
    return [texts[0], *(text + ratio for text, ratio in zip(texts[1:], ratios, strict=True))]


def markdown(cells: list[list[str]]) -> str:
    """Format cells as a Markdown table; the first row is its head."""
    lines = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def latex(cells: list[list[str]]) -> str:
    """Format cells as a LaTeX table with booktabs; LaTeX commands in cells are kept."""

    def line(row: list[str]) -> str:
        return " & ".join(cell.translate(SPECIAL).replace("±", r"$\pm$") for cell in row) + r" \\"

    head, *body = map(line, cells)
    lines = [f"\\begin{{tabular}}{{l{'r' * (len(cells[0]) - 1)}}}", "\\toprule", head, "\\midrule", *body]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def metrics_of(evaluations: list[Evaluation], task: str) -> list[str]:
    """Return the metrics of a task, accuracies first, without standard errors."""
    names = dict.fromkeys(name for one in evaluations for name in one.tasks.get(task, {}) if "stderr" not in name)
    return sorted(names, key=lambda name: name not in ("acc", "acc_norm"))


class _Rows:
    """Rows of a table of evaluations; a row without any value is left out."""

    def __init__(self, evaluations: list[Evaluation]):
        self.evaluations = evaluations
        self.rows: list[tuple[str, str, list[float | None]]] = []

    def add(self, name: str, form: str, value_of: Callable[[Evaluation], float | None]) -> None:
        values = [value_of(one) for one in self.evaluations]
        if any(value is not None for value in values):
            self.rows.append((name, form, values))

    def add_size(self) -> None:
        speed = self.evaluations[0].speed
        size = f" ({speed.batch} x {speed.tokens})" if speed else ""
        self.add("parameters", "{:,}", lambda e: e.parameters)
        self.add("not in embeddings", "{:,}", lambda e: e.non_embedding)
        for part in self.titles(lambda e: e.parts):
            self.add(f"... {part}", "{:,}", lambda e, part=part: e.parts.get(part))  # type: ignore[misc]
        self.add(f"multiply-accumulates{size}", "{:,}", lambda e: e.macs)
        self.add("weights, MiB", "{:.1f}", lambda e: e.weight_bytes / 2**20)
        self.add(f"cache, MiB{size}", "{:.2f}", lambda e: e.cache_bytes / 2**20)

    def add_quality(self, per_byte: bool) -> None:
        texts = self.titles(lambda e: e.perplexity)
        for text in texts:
            self.add(f"perplexity, {text}", "{:.2f}", lambda e, t=text: e.perplexity[t].perplexity)  # type: ignore[misc]
        for text in texts if per_byte else ():
            self.add(f"perplexity per byte, {text}", "{:.4f}", lambda e, t=text: e.perplexity[t].byte_perplexity)  # type: ignore[misc]
        for task in self.titles(lambda e: e.tasks):
            for metric in metrics_of(self.evaluations, task):
                self.add(f"{task}, {metric}", "{:.4f}", lambda e, t=task, m=metric: e.tasks.get(t, {}).get(m))  # type: ignore[misc]

    def add_speed(self) -> None:
        self.add("tokens/s, prefill", "{:.0f}", lambda e: e.speed.prefill if e.speed else None)
        self.add("tokens/s, decode", "{:.1f}", lambda e: e.speed.decode if e.speed else None)
        self.add("peak memory, MiB", "{:.0f}", _peak_mib)

    def titles(self, names_of: Callable[[Evaluation], Iterable[str]]) -> list[str]:
        """Return the names that any evaluation has, in order."""
        return list(dict.fromkeys(name for one in self.evaluations for name in names_of(one)))


def _peak_mib(evaluation: Evaluation) -> float | None:
    peak = evaluation.speed.peak_bytes if evaluation.speed else None
    return None if peak is None else peak / 2**20


def table(evaluations: list[Evaluation]) -> Table:
    """Build one table of all measurements."""
    rows = _Rows(evaluations)
    tokenizers_differ = len({one.tokenizer for one in evaluations}) > 1
    rows.add_size()
    rows.add_quality(per_byte=tokenizers_differ)
    rows.add_speed()
    notes = []
    if tokenizers_differ and evaluations[0].perplexity:
        notes.append("The models have different tokenizers: compare their perplexities per byte, not per token.")
    for title, p in {title: p for one in evaluations for title, p in one.perplexity.items()}.items():
        notes.append(f"{title}: {p.tokens:,} tokens in {p.windows} windows of {p.seq_len}, stride {p.stride}.")
    return Table([one.model for one in evaluations], rows.rows, notes)


def terminal_table(cells: list[list[str]]) -> TerminalTable:
    """Format cells as a table for the terminal; the first row is its head."""
    head, *body = cells
    shown = TerminalTable(*head)
    for row in body:
        shown.add_row(*row)
    return shown


def as_json(evaluations: list[Evaluation], about: dict[str, Any]) -> str:
    """Format all numbers as JSON, after the entries of ``about``."""
    return strict_json({**about, "models": [{**asdict(one), "results": None} for one in evaluations]})

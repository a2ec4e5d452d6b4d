"""Measurements of several models as one table: for the terminal, CSV, Markdown, LaTeX and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table as Shown

from .evaluate import Evaluation

SPECIAL = str.maketrans({c: f"\\{c}" for c in "_%&#$"})


@dataclass
class Table:
    """Rows of numbers, a column for each model."""

    models: list[str]
    rows: list[tuple[str, str, list[float | None]]]  # what, format, values
    notes: list[str]

    def cells(self) -> list[list[str]]:
        """The table as text, head first; every model after the first also shows its ratio to the first."""
        out = [["", *self.models]]
        for name, form, values in self.rows:
            row = [name]
            for i, value in enumerate(values):
                text = "" if value is None else form.format(value)
                first = values[0]
                if i and value is not None and first:
                    text += f" ({value / first:.3f})"
                row.append(text)
            out.append(row)
        return out

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


def markdown(cells: list[list[str]]) -> str:
    """Cells as a Markdown table; the first row are its heads."""
    lines = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def latex(cells: list[list[str]]) -> str:
    """Cells as a table for a paper, with booktabs; commands of LaTeX in them stand as they are."""

    def line(row: list[str]) -> str:
        return " & ".join(cell.translate(SPECIAL).replace("±", r"$\pm$") for cell in row) + r" \\"

    head, *body = map(line, cells)
    lines = [f"\\begin{{tabular}}{{l{'r' * (len(cells[0]) - 1)}}}", "\\toprule", head, "\\midrule", *body]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def metrics_of(found: list[Evaluation], task: str) -> list[str]:
    """The names of what a task measures, accuracies first; no standard errors."""
    names = dict.fromkeys(name for one in found for name in one.tasks.get(task, {}) if "stderr" not in name)
    return sorted(names, key=lambda name: name not in ("acc", "acc_norm"))


def table(found: list[Evaluation]) -> Table:
    """One table of all measurements."""
    rows: list[tuple[str, str, list[float | None]]] = []

    def add(name: str, form: str, value: Callable[[Evaluation], float | None]) -> None:
        values = [value(one) for one in found]
        if any(v is not None for v in values):
            rows.append((name, form, values))

    add("parameters", "{:,}", lambda e: e.parameters)
    add("not in embeddings", "{:,}", lambda e: e.non_embedding)
    for part in dict.fromkeys(part for one in found for part in one.parts):
        add(f"... {part}", "{:,}", lambda e, part=part: e.parts.get(part))  # type: ignore[misc]
    at = found[0].speed
    where = f" ({at.batch} x {at.tokens})" if at else ""
    add(f"multiply-accumulates{where}", "{:,}", lambda e: e.macs)
    add("weights, MiB", "{:.1f}", lambda e: e.weight_bytes / 2**20)
    add(f"cache, MiB{where}", "{:.2f}", lambda e: e.cache_bytes / 2**20)
    for title in dict.fromkeys(title for one in found for title in one.perplexity):
        add(f"perplexity, {title}", "{:.2f}", lambda e, t=title: e.perplexity[t].perplexity)  # type: ignore[misc]
    different = len({one.tokenizer for one in found}) > 1
    for title in dict.fromkeys(title for one in found for title in one.perplexity if different):
        add(f"perplexity of a byte, {title}", "{:.4f}", lambda e, t=title: e.perplexity[t].per_byte)  # type: ignore[misc]
    for task in dict.fromkeys(task for one in found for task in one.tasks):
        for metric in metrics_of(found, task):
            add(f"{task}, {metric}", "{:.4f}", lambda e, t=task, m=metric: e.tasks.get(t, {}).get(m))  # type: ignore[misc]
    add("tokens/s, prefill", "{:.0f}", lambda e: e.speed.prefill if e.speed else None)
    add("tokens/s, decode", "{:.1f}", lambda e: e.speed.decode if e.speed else None)
    peaks = {one.model: one.speed.peak_bytes / 2**20 for one in found if one.speed and one.speed.peak_bytes}
    add("peak memory, MiB", "{:.0f}", lambda e: peaks.get(e.model))
    notes = []
    if different and found[0].perplexity:
        notes.append("The models have different tokenizers: their perplexities do not compare; those of a byte do.")
    counted = {t: p for one in found for t, p in one.perplexity.items()}
    for title, p in counted.items():
        notes.append(f"{title}: {p.tokens:,} tokens in {p.windows} windows of {p.seq_len}, stride {p.stride}.")
    return Table([one.model for one in found], rows, notes)


def terminal_table(cells: list[list[str]]) -> Shown:
    """Cells as a table for the terminal; the first row are its heads."""
    out = Shown(*cells[0])
    for row in cells[1:]:
        out.add_row(*row)
    return out


def as_json(found: list[Evaluation], about: dict[str, Any]) -> str:
    """All numbers, and what ``about`` says of how they came to be."""
    models = [{**asdict(one), "results": None} for one in found]
    return json.dumps({**about, "models": models}, indent=1, default=str) + "\n"

"""Tables of recipes: of stages as they are finished, and of the points of a sweep, with means over seeds."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation.table import latex, markdown
from ..files import write_bytes, write_text

Row = dict[str, Any]
ORIGINAL = "original"
UNCOMPARED = ("seconds", "point")  # numbers that are no measurement of a model


def form(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def of_stages(rows: list[Row]) -> list[list[str]]:
    """Rows as text, head first; a number also as its ratio to that of the first row that has it."""
    heads = list(dict.fromkeys(key for row in rows for key in row if key != "folder"))
    first = {key: next((row[key] for row in rows if row.get(key) is not None), None) for key in heads}
    out = [heads]
    for row in rows:
        line = []
        for key in heads:
            value, base = row.get(key), first[key]
            text = form(value)
            if isinstance(value, (int, float)) and key not in UNCOMPARED and row is not rows[0] and base:
                text += f" ({value / base:.3f})"
            line.append(text)
        out.append(line)
    return out


def lower_is_better(key: str) -> bool | None:
    """What is good of a measurement; None where nothing is."""
    if key.startswith(("perplexity", "per byte")):
        return True
    if key.endswith(("acc", "acc_norm", "tokens/s")):
        return False
    return None


def of_points(rows: list[Row], varied: Sequence[str]) -> list[Row]:
    """One row for all seeds of a point: ``{key: (mean, standard deviation)}`` of what is measured.

    The deviation is that of the sample (n - 1), 0 of one. Point 0 is the original, which varies nothing.
    """
    keys = [key for key in varied if key != "seed"]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        which = [row.get("point") == 0, *(row.get(key) for key in keys)]
        groups.setdefault(json.dumps(which, default=str), []).append(row)
    out = []
    for group in groups.values():
        one: Row = {key: group[0].get(key) for key in keys}
        if len(group) > 1:
            one["seeds"] = len(group)
        for key in dict.fromkeys(key for row in group for key in row):
            if key in varied or key == "point" or key == "folder":
                continue
            values = [row[key] for row in group if row.get(key) is not None]
            if values and all(isinstance(v, (int, float)) for v in values):
                one[key] = (statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
            elif values:
                one[key] = values[0]
        if group[0].get("point") == 0:
            one = {"run": ORIGINAL} | one if not keys else one | {keys[0]: ORIGINAL}
        out.append(one)
    return out


def cells(rows: list[Row], bold: tuple[str, str]) -> list[list[str]]:
    """Rows of :func:`of_points` as text, head first, the best of each measurement between the marks of ``bold``."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    best = {}
    compared = [row for row in rows if ORIGINAL not in row.values()]
    for key in heads:
        lower, means = lower_is_better(key), [row[key][0] for row in compared if isinstance(row.get(key), tuple)]
        means = [mean for mean in means if math.isfinite(mean)]
        if lower is not None and len(compared) > 1 and means:
            best[key] = min(means) if lower else max(means)
    out = [heads]
    for row in rows:
        line = []
        for key in heads:
            value = row.get(key)
            if not isinstance(value, tuple):
                line.append(form(value))
                continue
            mean, deviation = value
            text = form(int(mean) if float(mean).is_integer() and abs(mean) >= 1000 else mean)
            text += f" ± {form(deviation)}" if "seeds" in row else ""
            marked = mean == best.get(key) and row in compared
            line.append(f"{bold[0]}{text}{bold[1]}" if marked else text)
        out.append(line)
    return out


def write_rows(rows: list[Row], output: Path) -> None:
    """``results.csv`` and ``results.json``: every run as it is."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_text(output / "results.csv", buffer.getvalue())
    write_text(output / "results.json", json.dumps(rows, indent=1, default=str) + "\n")


def write_stages(rows: list[Row], output: Path) -> None:
    write_rows(rows, output)
    write_text(output / "results.md", markdown(of_stages(rows)))


def write_points(rows: list[Row], varied: Sequence[str], output: Path) -> None:
    """All forms of a sweep's table; parquet too."""
    import pyarrow
    from pyarrow import parquet

    write_rows(rows, output)
    means = of_points(rows, varied)
    write_text(output / "results.md", markdown(cells(means, ("**", "**"))))
    write_text(output / "results.tex", latex(cells(means, (r"\textbf{", "}"))))
    heads = list(dict.fromkeys(key for row in rows for key in row))
    columns = {}
    for key in heads:
        values = [row.get(key) for row in rows]
        plain = all(v is None or isinstance(v, (int, float)) for v in values)
        columns[key] = values if plain else [None if v is None else str(v) for v in values]
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer)
    write_bytes(output / "results.parquet", buffer.getvalue())

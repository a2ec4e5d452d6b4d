"""Tables of results: of the stages of a run, and of the points of a sweep with means over seeds."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..evaluation.tabular import LATEX, MARKDOWN, Marks, latex, markdown, short_number
from ..files import strict_json, write_bytes, write_text
from .recipe import MODEL

Row = dict[str, Any]
ABBREVIATIONS = {
    "parameters": "params",
    "macs": "MACs",
    "perplexity": "ppl",
    "per byte": "ppl/byte",
    "prefill": "read",
    "decode": "write",
}
ORIGINAL = "original"
LARGE = 10_000  # from here counts have a prefix
NOT_MEASURED = ("point", "seed", "seconds")  # numbers that do not measure a model
STDERR = " stderr"  # end of the key of a measurement's standard error
COMPARED = ("cosine ", "agreement ")  # measurements that are ratios to the original already


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Means over seeds, a row for each point of a sweep; the original may be the first one.

    Attributes:
        points: values that the point varies, without the seed.
        seeds: runs of each point.
        mean: mean of every measurement, NaN where a seed has none.
        deviation: standard deviation of the sample (n - 1), 0 for a single run.
        error: mean standard error of measurements that have one, by the key of the measurement.
    """

    points: pd.DataFrame
    seeds: pd.Series
    mean: pd.DataFrame
    deviation: pd.DataFrame
    error: pd.DataFrame

    @property
    def is_original(self) -> pd.Series:
        return (self.points == ORIGINAL).any(axis=1)

    @property
    def labels(self) -> int:
        """Number of leading columns that name the row."""
        return self.points.shape[1] + bool((self.seeds > 1).any())

    def cells(self, bold: Marks) -> list[list[str]]:
        """Return the table as text, head first; ``bold`` marks the best number of each measurement."""
        repeated = self.seeds > 1
        seeds = {"seeds": [str(n) if n > 1 else "" for n in self.seeds]} if repeated.any() else {}
        heads = short_heads([*self.points, *self.mean])
        columns: dict[str, list[str]] = {heads[key]: [format_value(v) for v in self.points[key]] for key in self.points}
        columns |= seeds
        for key in self.mean:
            best = self._best(str(key))
            columns[heads[key]] = [
                _format_mean(mean, deviation if several else error, bold if i in best else ("", ""))
                for i, mean, deviation, error, several in zip(
                    self.mean.index, self.mean[key], self.deviation[key], self._errors(str(key)), repeated, strict=True
                )
            ]
        return [list(columns), *map(list, zip(*columns.values(), strict=True))]

    def _errors(self, key: str) -> list[float | None]:
        if key not in self.error:
            return [None] * len(self.mean)
        return [None if np.isnan(error) else float(error) for error in self.error[key]]

    def _best(self, key: str) -> list[Any]:
        """Return the rows with the best mean of a measurement; none if a higher number is neither better nor worse."""
        lower, means = lower_is_better(key), self.mean[key][~self.is_original]
        finite = means[np.isfinite(means)]
        if lower is None or len(means) < 2 or finite.empty:
            return []
        return list(means.index[means == (finite.min() if lower else finite.max())])


def summarize(rows: Sequence[Row], varied: Sequence[str]) -> Summary:
    """Average the runs of each point over its seeds.

    Args:
        rows: results of runs; point 0 is the original, which varies nothing.
        varied: keys that the sweep varies.
    """
    keys = [key for key in varied if key != "seed"]
    table = pd.DataFrame([_with_label(row, keys) for row in rows])
    labels = table[keys or ["run"]].map(lambda value: json.dumps(value, default=str)).agg("|".join, axis=1)
    groups = table.groupby(labels, sort=False)
    numbers = [str(key) for key in table.select_dtypes("number") if key not in (*keys, *NOT_MEASURED[:2])]
    measured = [key for key in numbers if not key.endswith(STDERR)]
    errors = [key for key in numbers if key.endswith(STDERR)]
    deviation = groups[measured].std().fillna(0.0)
    complete = groups[measured].count().eq(groups.size(), axis=0)  # infinite perplexities are not left out of a mean
    return Summary(
        points=groups[keys or ["run"]].first() if keys or len(groups) > 1 else groups[[]].first(),
        seeds=groups.size(),
        mean=groups[measured].mean().where(complete),
        deviation=deviation,
        error=groups[errors].mean().rename(columns=lambda key: key.removesuffix(STDERR)),
    )


def _with_label(row: Row, keys: Sequence[str]) -> Row:
    """Return a row with a value for every key; of an original, the first one besides the model is "original"."""
    values: Row = {key: row.get(key) for key in keys or ["run"]}
    if row.get("point") == 0:
        values[next((key for key in values if key != MODEL), MODEL)] = ORIGINAL
    return row | values


def format_value(value: Any) -> str:
    """Return a value as a table shows it: four digits, thousands separated, large counts with a prefix.

    >>> [format_value(value) for value in (None, 0.123456, 1234, 17779654656, 1234.5, "l2")]
    ['', '0.1235', '1,234', '17.8 G', '1,234', 'l2']
    """
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if abs(value) >= LARGE and float(value).is_integer():
        return short_number(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _format_mean(mean: float, deviation: float | None, bold: Marks) -> str:
    text = format_value(mean)
    return text and f"{bold[0]}{text}{'' if deviation is None else f' ± {format_value(deviation)}'}{bold[1]}"


def stage_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Return the rows of stages as text, head first; measurements also as ratios to the first row that has them."""
    heads = list(dict.fromkeys(key for row in rows for key in row if key != "folder" and not key.endswith(STDERR)))
    first = {key: next((row[key] for row in rows if row.get(key) is not None), None) for key in heads}
    body = [[_cell(row, key, None if row is rows[0] else first[key]) for key in heads] for row in rows]
    names = short_heads(heads)
    return [[names[key] for key in heads], *body]


def short_heads(keys: Sequence[Any]) -> dict[Any, str]:
    """Return the head of each column: arguments without the name of their stage, measurements abbreviated.

    >>> list(short_heads(["prune.taylor", "parameters", "perplexity wikitext2", "decode tokens/s"]).values())
    ['taylor', 'params', 'ppl wikitext2', 'write tok/s']
    """
    short = {key: str(key).rpartition(".")[2] if " " not in str(key) else str(key) for key in keys}
    heads = {key: name if list(short.values()).count(name) == 1 else str(key) for key, name in short.items()}
    for key, head in heads.items():
        for word, abbreviation in ABBREVIATIONS.items():
            head = abbreviation if head == word else head.replace(f"{word} ", f"{abbreviation} ")
        heads[key] = head.replace("tokens/s", "tok/s")
    return heads


def _cell(row: Mapping[str, Any], key: str, base: Any) -> str:
    value = row.get(key)
    error = row.get(f"{key}{STDERR}")
    text = format_value(value) + ("" if error is None else f" ± {error:.2g}")
    compared = isinstance(value, (int, float)) and key not in NOT_MEASURED and base
    compared = compared and not key.startswith(COMPARED)
    return f"{text} ({value / base:.3f})" if compared else text


def lower_is_better(key: str) -> bool | None:
    """Return True or False for a measurement of quality, None for others.

    >>> lower_is_better("perplexity wikitext2"), lower_is_better("piqa acc"), lower_is_better("parameters")
    (True, False, None)
    """
    if key.startswith(("perplexity", "per byte")) or key.endswith(" wer"):
        return True
    higher = key.startswith(COMPARED) or key.endswith(("acc", "acc_norm", "spearman", "tokens/s"))
    return False if higher else None


def write_stages(rows: Sequence[Row], output: Path) -> None:
    """Write the results of stages as ``results.json``, ``.csv`` and ``.md``."""
    _write_rows(rows, output)
    write_text(output / "results.md", markdown(stage_cells(rows)))


def write_points(rows: Sequence[Row], varied: Sequence[str], output: Path) -> None:
    """Write the results of a sweep: runs as ``results.json``, ``.csv``, ``.parquet``; means as ``.md`` and ``.tex``."""
    table = _write_rows(rows, output)
    summary = summarize(rows, varied)
    write_text(output / "results.md", markdown(summary.cells(MARKDOWN)))
    write_text(output / "results.tex", latex(summary.cells(LATEX)))
    mixed = table.select_dtypes("object").columns  # parquet has one type in a column
    buffer = io.BytesIO()
    table.astype(dict.fromkeys(mixed, "string")).to_parquet(buffer, index=False)
    write_bytes(output / "results.parquet", buffer.getvalue())


def _write_rows(rows: Sequence[Row], output: Path) -> pd.DataFrame:
    table = pd.DataFrame(rows).convert_dtypes()
    write_text(output / "results.csv", table.to_csv(index=False, lineterminator="\r\n"))
    write_text(output / "results.json", strict_json(rows))
    return table

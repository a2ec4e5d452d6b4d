"""Tabulate models by their measurements: for papers (Markdown, LaTeX), CSV, JSON and the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from ..display import percent
from ..files import strict_json
from ..serving.engines import NEW_TOKENS, PROMPT_TOKENS, ROUNDS
from ..turns import Ratio
from .evaluate import Evaluation
from .speed import Speed, warnings_of
from .tabular import LATEX, MARKDOWN, TERMINAL, Marks, latex, markdown, short_bytes, short_number, short_score

Values = list[float | None]
Rate = tuple[float | None, float | None, Ratio | None]  # tokens per second, spread, ratio to the first model's


@dataclass(frozen=True, kw_only=True)
class Column:
    """One measurement of all models.

    Attributes:
        key: name in CSV, where the numbers are complete and in base units.
        head: short name where people read.
        show: formats a number for people.
        errors: standard errors; empty if none are known.
        spreads: interquartile ranges of repetitions over the values; empty if none are known.
        lower_is_better: None for a number that is neither better nor worse.
        only_csv: too much detail for the other formats.
    """

    key: str
    head: str
    show: Callable[[float], str]
    values: Values
    errors: Values
    spreads: Values
    lower_is_better: bool | None = None
    only_csv: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """Models as rows, measurements as columns.

    Attributes:
        models: short names.
        reference: the first model is the original: it is larger than all others, and never the best.
        notes: sentences below the table.
    """

    models: list[str]
    columns: list[Column]
    notes: list[str]
    reference: bool = False

    def cells(self, marks: Marks = ("", "")) -> list[list[str]]:
        """Return the table as text, head first; ``marks`` go around the best number of a column."""
        models = [escape(name) for name in self.models] if marks == TERMINAL else self.models
        columns = [["model", *models]]
        for column in self.columns:
            if not column.only_csv:
                columns.append([column.head, *self._column_cells(column, marks)])
        return [list(row) for row in zip(*columns, strict=True)]

    def _column_cells(self, column: Column, marks: Marks) -> list[str]:
        texts = ["" if value is None else column.show(value) for value in column.values]
        best = self._best(column, texts)
        shown = list(texts)
        for i, error in enumerate(column.errors):
            shown[i] += "" if error is None else f" ± {column.show(error)}"
        for i, spread in enumerate(column.spreads):
            shown[i] += "" if spread is None else f" ±{percent(spread)}"
        return [cell.join(marks) if text and text == best else cell for text, cell in zip(texts, shown, strict=True)]

    def _best(self, column: Column, texts: list[str]) -> str:
        """Return the best number as shown, so that equal ones are marked alike; "" where nothing competes."""
        start = int(self.reference)
        entries = [(v, t) for v, t in zip(column.values[start:], texts[start:], strict=True) if v is not None]
        if column.lower_is_better is None or len(entries) < 2 or len({text for _, text in entries}) == 1:
            return ""
        return (min if column.lower_is_better else max)(entries)[1]

    def csv(self) -> str:
        """Format the table as CSV with complete numbers, errors and spreads in columns of their own."""
        heads, columns = ["model"], [list[Any](self.models)]
        for column in self.columns:
            heads.append(column.key)
            columns.append(column.values)
            if column.errors:
                heads.append(f"{column.key}_stderr")
                columns.append(column.errors)
            if column.spreads:
                heads.append(f"{column.key}_spread")
                columns.append(column.spreads)
        buffer = io.StringIO()
        writer = csv.writer(buffer)
        writer.writerow(heads)
        for row in zip(*columns, strict=True):
            writer.writerow(["" if value is None else value for value in row])
        return buffer.getvalue()

    def markdown(self) -> str:
        return "\n".join([markdown(self.cells(MARKDOWN)), *(f"{note}\n" for note in self.notes)])

    def latex(self) -> str:
        return latex(self.cells(LATEX)) + "".join(f"% {note}\n" for note in self.notes)


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Return each model's or text's shortest name: the last parts of its path that tell it from the others.

    >>> short_names(["smollm2-135m", "prune_log/a", "tune_log/a/merged"])
    {'smollm2-135m': 'smollm2-135m', 'prune_log/a': 'prune_log/a', 'tune_log/a/merged': 'tune_log/a'}
    >>> short_names(["/data/news.txt", "wikitext2"])
    {'/data/news.txt': 'news', 'wikitext2': 'wikitext2'}
    """
    parts = {}
    for name in names:
        path = Path(name)
        path = path.parent if path.name == "merged" and path.parent.name else path
        parts[name] = (*path.parts[:-1], path.stem if path.suffix in (".txt", ".json", ".jsonl") else path.name)
    shorts = {name: path[-1] if path else name for name, path in parts.items()}
    for count in range(2, 1 + max(map(len, parts.values()), default=1)):
        taken = list(shorts.values())
        shorts = {n: "/".join(parts[n][-count:]) if taken.count(short) > 1 else short for n, short in shorts.items()}
    if len(set(shorts.values())) == len(shorts):
        return shorts
    return {name: name for name in parts}


def metrics_of(evaluations: list[Evaluation], task: str) -> list[str]:
    """Return the metrics of a task, accuracies first, without standard errors."""
    names = dict.fromkeys(name for one in evaluations for name in one.tasks.get(task, {}) if "stderr" not in name)
    return sorted(names, key=lambda name: name not in ("acc", "acc_norm"))


class _Columns:
    """Columns of a table of evaluations; a column without any value is left out."""

    def __init__(self, evaluations: list[Evaluation]):
        self.evaluations = evaluations
        self.columns: list[Column] = []

    def add(
        self,
        key: str,
        head: str,
        show: Callable[[float], str],
        value_of: Callable[[Evaluation], float | None],
        *,
        error_of: Callable[[Evaluation], float | None] = lambda evaluation: None,
        spread_of: Callable[[Evaluation], float | None] = lambda evaluation: None,
        lower_is_better: bool | None = None,
        only_csv: bool = False,
    ) -> None:
        values, errors, spreads = ([of(one) for one in self.evaluations] for of in (value_of, error_of, spread_of))
        if any(value is not None for value in values):
            self.columns.append(
                Column(
                    key=key,
                    head=head,
                    show=show,
                    values=values,
                    errors=errors if any(error is not None for error in errors) else [],
                    spreads=spreads if any(spread is not None for spread in spreads) else [],
                    lower_is_better=lower_is_better,
                    only_csv=only_csv,
                )
            )

    def add_size(self) -> None:
        first = self.evaluations[0].parameters
        self.add("parameters", "params", lambda n: short_number(n, giga="B"), lambda e: e.parameters)
        if len(self.evaluations) > 1:
            self.add("parameters_ratio", "ratio", "{:.3f}".format, lambda e: e.parameters / first)
        self.add("parameters_not_in_embeddings", "", short_number, lambda e: e.non_embedding, only_csv=True)
        for part in self.names(lambda e: e.parts):
            self.add(f"parameters_{part}", "", short_number, lambda e, p=part: e.parts.get(p), only_csv=True)  # type: ignore[misc]
        self.add("macs", "MACs", short_number, lambda e: e.macs)
        self.add("weight_bytes", "weights", short_bytes, lambda e: e.weight_bytes)
        self.add("cache_bytes", "cache", short_bytes, lambda e: e.cache_bytes, only_csv=True)

    def add_quality(self, per_byte: bool) -> None:
        texts = short_names(self.names(lambda e: e.perplexity))
        quantities = {"perplexity": "ppl"} | ({"byte_perplexity": "ppl/byte"} if per_byte else {})
        for field, short in quantities.items():
            for text, title in texts.items():
                self.add(
                    f"{field}_{title}",
                    f"{short} {title}",
                    short_score,
                    lambda e, t=text, f=field: getattr(e.perplexity[t], f) if t in e.perplexity else None,  # type: ignore[misc]
                    lower_is_better=True,
                )
        for field in ("cosine", "agreement"):
            for text, title in short_names(self.names(lambda e: e.similarity)).items():
                self.add(
                    f"{field}_{title}",
                    f"{field} {title}",
                    "{:.3f}".format,
                    lambda e, t=text, f=field: getattr(e.similarity[t], f) if t in e.similarity else None,  # type: ignore[misc]
                    lower_is_better=False,
                )
        for task, title in short_names(self.names(lambda e: e.tasks)).items():
            for metric in metrics_of(self.evaluations, task):
                self.add_metric(task, metric, title)

    def add_metric(self, task: str, metric: str, title: str) -> None:
        accuracy = metric in ("acc", "acc_norm")
        self.add(
            f"{title}_{metric}",
            f"{title} {metric}{' %' if accuracy else ''}",
            (lambda value: f"{100 * value:.1f}") if accuracy else short_score,
            lambda e: e.tasks.get(task, {}).get(metric),
            error_of=lambda e: e.tasks.get(task, {}).get(f"{metric}_stderr"),
            lower_is_better=False if accuracy or metric == "spearman" else True if metric == "wer" else None,
        )

    def add_speed(self) -> None:
        self.add_rate("prefill", "read", lambda s: (s.prefill, s.prefill_spread, s.prefill_ratio))
        self.add_rate("decode", "write", lambda s: (s.decode, s.decode_spread, s.decode_ratio))
        self.add("peak_bytes", "peak", short_bytes, lambda e: e.speed.peak_bytes if e.speed else None)

    def add_rate(self, key: str, head: str, rate_of: Callable[[Speed], Rate]) -> None:
        """Add tokens per second and their ratio; no speed is the best while a ratio says nothing."""

        def rate(evaluation: Evaluation) -> Rate:
            return rate_of(evaluation.speed) if evaluation.speed else (None, None, None)

        ratios = [ratio for _, _, ratio in map(rate, self.evaluations) if ratio]
        self.add(
            f"{key}_tokens_per_second",
            f"{head} tok/s",
            short_score,
            lambda e: rate(e)[0],
            spread_of=lambda e: rate(e)[1],
            lower_is_better=False if all(ratio.is_clear for ratio in ratios) else None,
        )
        self.add(
            f"{key}_ratio",
            f"{head} ratio",
            "{:.2f}".format,
            lambda e: ratio.median if (ratio := rate(e)[2]) else None,
            spread_of=lambda e: ratio.spread if (ratio := rate(e)[2]) else None,
        )

    def add_engine(self) -> None:
        """Add tokens per second in another engine by sequences at once, time to the first token, and memory."""
        first = self.evaluations[0].engine
        if first is None:
            return
        for batch in first.tokens_per_second:
            self.add(
                f"{first.engine}_tokens_per_second_{batch}",
                f"{first.engine} x{batch} tok/s",
                short_score,
                lambda e, b=batch: e.engine.tokens_per_second[b],  # type: ignore[misc]
                spread_of=lambda e, b=batch: e.engine.spread[b],  # type: ignore[misc]
                lower_is_better=False,
            )
        self.add(
            f"{first.engine}_first_token_seconds",
            f"{first.engine} first ms",
            short_score,
            lambda e: 1000 * e.engine.first_token_seconds if e.engine else None,
            lower_is_better=True,
        )
        self.add(
            f"{first.engine}_bytes",
            f"{first.engine} memory",
            short_bytes,
            lambda e: e.engine.bytes if e.engine else None,
        )

    def names(self, names_of: Callable[[Evaluation], Iterable[str]]) -> list[str]:
        """Return the names that any evaluation has, in order."""
        return list(dict.fromkeys(name for one in self.evaluations for name in names_of(one)))


def table(evaluations: list[Evaluation]) -> Table:
    """Build one table of all measurements, a row for each model."""
    columns = _Columns(evaluations)
    tokenizers_differ = len({one.tokenizer for one in evaluations}) > 1
    columns.add_size()
    columns.add_quality(per_byte=tokenizers_differ)
    columns.add_speed()
    columns.add_engine()
    first, *others = (one.parameters for one in evaluations)
    return Table(
        models=_row_names([one.model for one in evaluations]),
        columns=columns.columns,
        notes=_notes(evaluations, tokenizers_differ),
        reference=bool(others) and first > max(others),
    )


def _row_names(models: Sequence[str]) -> list[str]:
    """Return short names of models; a model that is measured twice keeps its name twice."""
    shorts = short_names(models)
    return [shorts[model] for model in models]


def _notes(evaluations: list[Evaluation], tokenizers_differ: bool) -> list[str]:
    notes = []
    if tokenizers_differ and evaluations[0].perplexity:
        notes.append("The models have different tokenizers: compare their perplexities per byte, not per token.")
    perplexities = {title: p for one in evaluations for title, p in one.perplexity.items()}
    titles = short_names(perplexities)
    for title, p in perplexities.items():
        notes.append(
            f"ppl {titles[title]}: perplexity of {p.tokens:,} tokens in {p.windows} windows of {p.seq_len}, stride "
            f"{p.stride}."
        )
    alike = {title: s for one in evaluations for title, s in one.similarity.items()}
    titles = short_names(alike)
    for title, s in alike.items():
        notes.append(
            f"{titles[title]}: cosine or agreement of the outputs with the first model's on {s.pieces} pieces."
        )
    notes += _speed_notes(evaluations)
    if (engine := evaluations[0].engine) is not None:
        notes.append(
            f"{engine.engine}: xN is N sequences at once, of {PROMPT_TOKENS} tokens read and {NEW_TOKENS} written; "
            f"medians of {ROUNDS} rounds in turns."
        )
    if any("_stderr" in name for one in evaluations for task in one.tasks.values() for name in task):
        notes.append("±: standard error of the task's mean.")
    return notes


def _speed_notes(evaluations: list[Evaluation]) -> list[str]:
    """Return notes on speeds: the sizes that were timed, the summary of the repetitions, and ratios that are noise."""
    speeds = [one.speed for one in evaluations]
    first = speeds[0]
    if first is None:
        return []
    size = f"{first.batch} x {first.tokens} tokens"
    notes = [f"MACs and reading: {size}. Writing: {first.batch} x {first.new_tokens} tokens."]
    compared = any(one.prefill_ratio for one in speeds if one)
    if first.prefill_spread is not None:
        ratios = " Ratios to the first model are medians of the rounds' ratios." if compared else ""
        notes.append(f"tok/s: median of {first.rounds} rounds, ± interquartile range in percent of it.{ratios}")
    if len(speeds) > 1 and not compared:
        notes.append(
            "The models were timed one after the other: a load on the machine that changed looks like a difference."
        )
    return notes + warnings_of(_row_names([one.model for one in evaluations]), speeds)


def as_json(evaluations: list[Evaluation], about: dict[str, Any]) -> str:
    """Format all numbers as JSON, after the entries of ``about``."""
    return strict_json({**about, "models": [{**asdict(one), "results": None} for one in evaluations]})

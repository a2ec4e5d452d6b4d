"""Tabulate models by their measurements: for papers (Markdown, LaTeX), CSV, JSON and the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.markup import escape

from ..display import percent
from ..files import strict_json
from ..turns import Ratio
from .evaluate import Evaluation, have_one_tokenizer
from .names import error_name, members_of, metrics_of, row_names, short_names
from .notes import notes_of
from .paired import MEAN, Comparison, Interval, compare_questions, mean_accuracy
from .questions import is_accuracy
from .speed import Speed
from .tabular import (
    LATEX,
    MARKDOWN,
    TERMINAL,
    Marks,
    latex,
    markdown,
    short_bytes,
    short_number,
    short_percent,
    short_score,
)

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
        intervals: bounds that hold the true value with a probability of 95%; empty if none are known.
        lower_is_better: None for a number that is neither better nor worse.
        only_csv: too much detail for the other formats.
    """

    key: str
    head: str
    show: Callable[[float], str]
    values: Values
    errors: Values
    spreads: Values
    intervals: list[tuple[float, float] | None] = field(default_factory=list)
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
        for i, bounds in enumerate(column.intervals):
            shown[i] += "" if bounds is None else f" [{', '.join(map(column.show, bounds))}]"
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
            for i, bound in enumerate(("low", "high")) if column.intervals else ():
                heads.append(f"{column.key}_{bound}")
                columns.append([None if bounds is None else bounds[i] for bounds in column.intervals])
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


class _Columns:
    """Columns of a table of evaluations; a column without any value is left out."""

    def __init__(self, evaluations: list[Evaluation], comparisons: Sequence[Mapping[str, Comparison]]):
        self.evaluations = evaluations
        self.comparisons = {id(one): comparison for one, comparison in zip(evaluations, comparisons, strict=True)}
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
        interval_of: Callable[[Evaluation], Interval | None] = lambda evaluation: None,
        lower_is_better: bool | None = None,
        only_csv: bool = False,
    ) -> None:
        values, errors, spreads = ([of(one) for one in self.evaluations] for of in (value_of, error_of, spread_of))
        intervals = [interval_of(one) for one in self.evaluations]
        if any(value is not None for value in values):
            self.columns.append(
                Column(
                    key=key,
                    head=head,
                    show=show,
                    values=values,
                    errors=errors if any(error is not None for error in errors) else [],
                    spreads=spreads if any(spread is not None for spread in spreads) else [],
                    intervals=[(one.low, one.high) if one else None for one in intervals] if any(intervals) else [],
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
        one_tokenizer = have_one_tokenizer(self.evaluations)
        quantities = {"perplexity": "ppl"} | ({"byte_perplexity": "ppl/byte"} if per_byte else {})
        for quantity, short in quantities.items():
            for text, title in texts.items():
                self.add(
                    f"{quantity}_{title}",
                    f"{short} {title}",
                    short_score,
                    lambda e, t=text, f=quantity: getattr(e.perplexity[t], f) if t in e.perplexity else None,  # type: ignore[misc]
                    lower_is_better=True if one_tokenizer or quantity == "byte_perplexity" else None,
                )
        for measure in ("cosine", "agreement"):
            for text, title in short_names(self.names(lambda e: e.similarity)).items():
                self.add(
                    f"{measure}_{title}",
                    f"{measure} {title}",
                    "{:.3f}".format,
                    lambda e, t=text, f=measure: getattr(e.similarity[t], f) if t in e.similarity else None,  # type: ignore[misc]
                    lower_is_better=False,
                )
        for text, title in short_names(self.names(lambda e: e.divergence)).items():
            self.add(
                f"kl_{title}",
                f"KL {title}",
                "{:.3f}".format,
                lambda e, t=text: e.divergence[t].kl if t in e.divergence else None,  # type: ignore[misc]
                error_of=lambda e, t=text: e.divergence[t].error if t in e.divergence else None,  # type: ignore[misc]
                lower_is_better=True,
            )
        for task, title in short_names(self.names(lambda e: e.tasks)).items():
            for metric in metrics_of(self.evaluations, task):
                self.add_metric(task, metric, title)

    def add_metric(self, task: str, metric: str, title: str) -> None:
        accuracy = is_accuracy(metric)
        asked = [questions for e in self.evaluations if (questions := e.questions.get(task)) is not None]
        limits = {f" (first {len(questions.ids):,})" for questions in asked if len(questions.ids) < questions.total}
        first = next(iter(limits), "")
        self.add(
            f"{title}_{metric}",
            f"{title}{first} {metric}{' %' if accuracy else ''}",
            short_percent if accuracy else short_score,
            lambda e: e.tasks.get(task, {}).get(metric),
            error_of=lambda e: e.tasks.get(task, {}).get(error_name(metric)),
            lower_is_better=False if accuracy or metric == "spearman" else True if metric == "wer" else None,
            only_csv=task in members_of(self.evaluations),
        )

    def add_comparisons(self) -> None:
        """Add what the first model's answers tell of the others': the mean of all tasks, and in CSV each task."""
        tasks = list(dict.fromkeys(task for comparison in self.comparisons.values() for task in comparison))
        if not tasks:
            return
        if tasks[0] == MEAN:
            self.add(
                "mean_accuracy",
                "mean acc %",
                short_percent,
                lambda e: mean_accuracy(e.questions)[0] if e.questions else None,
                error_of=lambda e: mean_accuracy(e.questions)[1] if e.questions else None,
                lower_is_better=False,
            )
        for task in tasks:
            self.add_comparison(task, only_csv=task != tasks[0])

    def add_comparison(self, task: str, *, only_csv: bool) -> None:
        def of(evaluation: Evaluation) -> Comparison | None:
            return self.comparisons[id(evaluation)].get(task)

        def kept(evaluation: Evaluation) -> Interval | None:
            return one.retention if (one := of(evaluation)) else None

        def difference(evaluation: Evaluation) -> Interval | None:
            return one.difference if (one := of(evaluation)) else None

        for key, head, interval_of, better in (
            ("kept", "kept %", kept, False),
            ("difference", "difference, points", difference, None),
        ):
            self.add(
                f"{task}_{key}",
                head,
                short_percent,
                lambda e, f=interval_of: one.value if (one := f(e)) else None,  # type: ignore[misc]
                interval_of=interval_of,
                lower_is_better=better,
                only_csv=only_csv,
            )
        self.add(
            f"{task}_difference_is_real",
            "real",
            lambda value: "yes" if value else "no",
            lambda e: float(one.is_real) if (one := of(e)) else None,
            only_csv=only_csv,
        )
        self.add(
            f"{task}_same_answers",
            "same answers %",
            short_percent,
            lambda e: one.agreement if (one := of(e)) else None,
            lower_is_better=False,
            only_csv=only_csv,
        )

    def add_generation(self) -> None:
        self.add("repetition", "repeats %", short_percent, lambda e: e.generation.repetition if e.generation else None)
        self.add("generated_tokens", "length", short_score, lambda e: e.generation.tokens if e.generation else None)
        self.add("ended", "", short_percent, lambda e: e.generation.ended if e.generation else None, only_csv=True)

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


def compare_with_first(evaluations: Sequence[Evaluation]) -> list[dict[str, Comparison]]:
    """Return the comparison of each model's answers with the first model's; that of the first is empty."""
    return [
        compare_questions(evaluations[0].questions, one.questions) if i else {} for i, one in enumerate(evaluations)
    ]


def table(evaluations: list[Evaluation]) -> Table:
    """Build one table of all measurements, a row for each model."""
    comparisons = compare_with_first(evaluations)
    columns = _Columns(evaluations, comparisons)
    columns.add_size()
    columns.add_quality(per_byte=len(evaluations) > 1)
    columns.add_comparisons()
    columns.add_generation()
    columns.add_speed()
    columns.add_engine()
    first, *others = (one.parameters for one in evaluations)
    return Table(
        models=row_names([one.model for one in evaluations]),
        columns=columns.columns,
        notes=notes_of(evaluations, comparisons),
        reference=bool(others) and first > max(others),
    )


def as_json(evaluations: list[Evaluation], about: dict[str, Any]) -> str:
    """Format all numbers as JSON, after the entries of ``about``."""
    models = []
    for one, comparison in zip(evaluations, compare_with_first(evaluations), strict=True):
        record = {**asdict(replace(one, questions={})), "results": None}
        record["questions"] = {task: questions.encode() for task, questions in one.questions.items()}
        record["comparison"] = {
            task: {**asdict(compared), "is_real": compared.is_real} for task, compared in comparison.items()
        }
        models.append(record)
    return strict_json({**about, "models": models})

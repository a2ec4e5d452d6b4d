"""Notes below a table of models: protocols, limits, and which differences are real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..serving.engines import NEW_TOKENS, PROMPT_TOKENS, ROUNDS
from .evaluate import Evaluation, have_one_tokenizer
from .names import row_names, short_names
from .paired import MEAN, Comparison, compare_questions
from .speed import warnings_of


def notes_of(evaluations: list[Evaluation], comparisons: Sequence[Mapping[str, Comparison]]) -> list[str]:
    """Return the notes of a table.

    Args:
        comparisons: of each model with the first one; see :func:`~.paired.compare_questions`.
    """
    notes = []
    if not have_one_tokenizer(evaluations) and evaluations[0].perplexity:
        notes.append("The models have different tokenizers: compare their perplexities per byte, not per token.")
    notes += _text_notes(evaluations)
    notes += _speed_notes(evaluations)
    if (engine := evaluations[0].engine) is not None:
        notes.append(
            f"{engine.engine}: xN is N sequences at once, of {PROMPT_TOKENS} tokens read and {NEW_TOKENS} written; "
            f"medians of {ROUNDS} rounds in turns."
        )
    notes += _task_notes(evaluations)
    return notes + _difference_notes(evaluations, comparisons)


def _by_text(evaluations: list[Evaluation], quantity: str) -> list[tuple[str, Any]]:
    """Return what was measured on each text, by its short name: of the last model that has the quantity on it."""
    measured = {title: value for one in evaluations for title, value in getattr(one, quantity).items()}
    titles = short_names(measured)
    return [(titles[title], value) for title, value in measured.items()]


def _text_notes(evaluations: list[Evaluation]) -> list[str]:
    notes = []
    for title, p in _by_text(evaluations, "perplexity"):
        notes.append(
            f"ppl {title}: perplexity of {p.tokens:,} tokens in {p.windows} windows of {p.seq_len}, stride {p.stride}."
        )
    for title, d in _by_text(evaluations, "divergence"):
        notes.append(
            f"KL {title}: divergence of the next-token distributions from the first model's, nats per token, "
            f"mean of {d.tokens:,} tokens ± standard error over windows."
        )
    for title, s in _by_text(evaluations, "similarity"):
        notes.append(f"{title}: cosine or agreement of the outputs with the first model's on {s.pieces} pieces.")
    if (quality := next((one.generation for one in evaluations if one.generation), None)) is not None:
        notes.append(
            f"repeats, length: share of 4-grams that a text has before, and its tokens, of {quality.prompts} greedy "
            f"continuations of at most {quality.new_tokens} tokens."
        )
    return notes


def _task_notes(evaluations: list[Evaluation]) -> list[str]:
    notes = []
    questions = {task: q for one in evaluations for task, q in one.questions.items()}
    titles = short_names(questions)
    for task, q in questions.items():
        if len(q.ids) < q.total:
            notes.append(
                f"{titles[task]}: only {len(q.ids):,} of its {q.total:,} questions (--limit); "
                "not comparable with published numbers."
            )
    if any("_stderr" in name for one in evaluations for task in one.tasks.values() for name in task):
        notes.append("±: standard error of the task's mean.")
    return notes


def _difference_notes(evaluations: list[Evaluation], comparisons: Sequence[Mapping[str, Comparison]]) -> list[str]:
    """Say of each model whether its accuracy really differs from the first model's, and from the one above it."""
    if not any(comparisons):
        return []
    names = row_names([one.model for one in evaluations])
    notes = [
        "kept: share of the first model's accuracy above chance. In brackets: 95% intervals by paired bootstrap over "
        "the questions. A difference is real if its interval excludes 0; same answers: right or wrong."
    ]
    for i, comparison in enumerate(comparisons):
        if comparison:
            notes.append(explain_difference(names[i], names[0], comparison))
        if i > 1 and (step := compare_questions(evaluations[i - 1].questions, evaluations[i].questions)):
            notes.append(explain_difference(names[i], names[i - 1], step))
    return notes


def explain_difference(model: str, other: str, comparison: Mapping[str, Comparison]) -> str:
    """Return a sentence on the difference of two models, and on every task.

    Args:
        comparison: of ``model`` with ``other``.
    """
    first, *tasks = comparison
    parts = ", ".join(f"{task} {_verdict(comparison[task])}" for task in tasks)
    what = f"mean of {len(tasks)} tasks" if first == MEAN else first
    return f"{model} against {other}: {what} {_verdict(comparison[first])}{f' ({parts})' if parts else ''}."


def _verdict(comparison: Comparison) -> str:
    d = comparison.difference
    low, high = (f"{100 * bound:+.1f}" for bound in (d.low, d.high))
    real = "real" if comparison.is_real else "may be chance"
    return f"{100 * d.value:+.1f} points [{low}, {high}], {real}"


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
    return notes + warnings_of(row_names([one.model for one in evaluations]), speeds)

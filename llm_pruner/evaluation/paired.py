"""Compare two models question by question: difference, retention and agreement, with intervals by paired bootstrap.

Both models answer the same questions, so their errors are correlated, and the interval of the difference is narrower
than two standard errors suggest. The bootstrap draws questions with replacement, and keeps the two answers to a
question together. Of each task, equal pairs of answers are counted first and drawn by a multinomial distribution, which
is the same draw in a fraction of the time.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .questions import Questions

RESAMPLES = 10_000
LEVEL = 0.95
PER_DRAW = 2_000_000  # counts held at a time
MEAN = "mean"  # name of the comparison over all tasks
Numbers = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate, and the interval that holds the true value with a probability of 95%."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model compared with the original on the same questions.

    Attributes:
        questions: questions that both models answered.
        original, accuracy: accuracies on them.
        error: standard error of ``accuracy``.
        difference: accuracy less that of the original.
        retention: share of the original's accuracy above chance that is left; None if the original's is not clearly
            above chance.
        agreement: share of the questions with the same answer, right or wrong.
    """

    questions: int
    original: float
    accuracy: float
    error: float
    difference: Interval
    retention: Interval | None
    agreement: float

    @property
    def is_real(self) -> bool:
        """Return True if the interval of the difference excludes 0."""
        return self.difference.low > 0 or self.difference.high < 0


@dataclass(frozen=True, kw_only=True)
class _Resampled:
    """Means of a task, and of its resamples ``[resamples]``: of the original, the model, and chance."""

    estimate: Numbers
    draws: Numbers
    error: float
    questions: int
    agreement: float


def compare_questions(
    original: Mapping[str, Questions], other: Mapping[str, Questions], *, seed: int = 0
) -> dict[str, Comparison]:
    """Compare a model with the original on every task that both were asked, and on the mean of these tasks.

    Of a task, the questions count that both answered. Tasks with other metrics or another number of worked examples are
    left out.

    Args:
        seed: of the resamples; equal inputs give equal intervals.

    Returns:
        Comparisons by task; if there are several, :data:`MEAN` is the first.
    """
    tasks = {}
    for name in (name for name in original if name in other):
        first, second = original[name], other[name]
        if (first.metric, first.examples) == (second.metric, second.examples):
            resampled = _resample(first, second, np.random.default_rng([seed, zlib.crc32(name.encode())]))
            if resampled is not None:
                tasks[name] = resampled
    comparisons = {name: _compare([resampled]) for name, resampled in tasks.items()}
    return {MEAN: _compare([*tasks.values()])} | comparisons if len(tasks) > 1 else comparisons


def mean_accuracy(tasks: Mapping[str, Questions]) -> tuple[float, float]:
    """Return the mean of the accuracies of tasks, each counted equally, and its standard error."""
    scores = [np.array(questions.scores) for questions in tasks.values()]
    errors = [float(one.std(ddof=1) / len(one) ** 0.5) if len(one) > 1 else 0.0 for one in scores]
    return float(np.mean([one.mean() for one in scores])), float(np.linalg.norm(errors) / len(scores))


def _resample(first: Questions, other: Questions, generator: np.random.Generator) -> _Resampled | None:
    places = {key: j for j, key in enumerate(_keys(other.ids))}
    common = [(i, places[key]) for i, key in enumerate(_keys(first.ids)) if key in places]
    if not common:
        return None
    rows = np.array([(first.scores[i], other.scores[j], first.chance[i]) for i, j in common])
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    shares, size = counts / len(common), max(1, PER_DRAW // len(kinds))
    draws = [
        generator.multinomial(len(common), shares, min(size, RESAMPLES - start)) @ kinds / len(common)
        for start in range(0, RESAMPLES, size)
    ]
    return _Resampled(
        estimate=rows.mean(axis=0),
        draws=np.concatenate(draws),
        error=float(rows[:, 1].std(ddof=1) / len(common) ** 0.5) if len(common) > 1 else 0.0,
        questions=len(common),
        agreement=sum(first.answers[i] == other.answers[j] for i, j in common) / len(common),
    )


def _keys(ids: Sequence[str]) -> list[tuple[str, int]]:
    """Return each id with the number of times that it occurred before: some tasks repeat a question."""
    seen: Counter[str] = Counter()
    keys = []
    for identity in ids:
        keys.append((identity, seen[identity]))
        seen[identity] += 1
    return keys


def _compare(tasks: list[_Resampled]) -> Comparison:
    """Compare on the mean of tasks; each counts equally, however many questions it has."""
    estimate = np.mean([task.estimate for task in tasks], axis=0)
    draws = np.mean([task.draws for task in tasks], axis=0)
    (original, accuracy, chance), (firsts, others, chances) = estimate, draws.T
    above, tail = firsts - chances, (1 - LEVEL) / 2
    retention = None
    if np.quantile(above, tail) > 0 and original > chance:
        shares = (others - chances)[above > 0] / above[above > 0]
        retention = _interval(float((accuracy - chance) / (original - chance)), shares)
    return Comparison(
        questions=sum(task.questions for task in tasks),
        original=float(original),
        accuracy=float(accuracy),
        error=float(np.linalg.norm([task.error for task in tasks]) / len(tasks)),
        difference=_interval(float(accuracy - original), others - firsts),
        retention=retention,
        agreement=float(np.mean([task.agreement for task in tasks])),
    )


def _interval(value: float, draws: Numbers) -> Interval:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value=value, low=float(low), high=float(high))

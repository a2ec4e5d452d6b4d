"""Measure several models in turns, so that a passing load on the machine slows all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .display import percent

T = TypeVar("T")
ROUNDS = 7  # of two equally fast models, noise alone gives a clear ratio once in 17 times; with 5 rounds once in 6


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Ratio of a model's measurement to the first model's.

    Attributes:
        median: of the ratios of all rounds; each pairs two measurements of the same round.
        spread: interquartile range of these ratios over their median.
    """

    median: float
    spread: float

    @property
    def is_clear(self) -> bool:
        """Return True if the ratio differs from 1 by more than the interquartile range of its rounds.

        That range then does not include 1 either, since it includes the median.
        """
        return abs(self.median - 1) > self.spread * self.median

    @property
    def warning(self) -> str:
        """Return a sentence for a ratio that is not clear; "" for one that is."""
        if self.is_clear:
            return ""
        return (
            f"speeds vary by {percent(self.spread)} between repetitions: close other programs, or repeat; "
            f"the ratio {self.median:.2f} says nothing"
        )


def in_turns(measures: Sequence[Callable[[], T]], rounds: int = ROUNDS) -> list[list[T]]:
    """Call every measure once a round, round after round; return the results of each measure, in order of the rounds.

    Call each measure once before, as a warm-up.

    >>> order = []
    >>> in_turns([lambda: order.append("a"), lambda: order.append("b")], rounds=2)
    [[None, None], [None, None]]
    >>> order
    ['a', 'b', 'a', 'b']
    """
    results: list[list[T]] = [[] for _ in measures]
    for _ in range(rounds):
        for measure, values in zip(measures, results, strict=True):
            values.append(measure())
    return results


def relative_spread(values: Sequence[float]) -> float:
    """Return the interquartile range of repeated measurements over their median: one outlier does not count.

    >>> relative_spread([90, 100, 110, 100, 400])
    0.1
    """
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return (upper - lower) / median


def paired_ratio(values: Sequence[float], first: Sequence[float]) -> Ratio:
    """Compare measurements with the first model's of the same rounds.

    >>> paired_ratio([30.0, 15.0, 30.0], [20.0, 10.0, 20.0])  # half as fast in the second round, both of them
    Ratio(median=1.5, spread=0.0)
    """
    ratios = [value / other for value, other in zip(values, first, strict=True)]
    return Ratio(median=statistics.median(ratios), spread=relative_spread(ratios))

"""Budgets of training: tokens or minutes, whichever are spent first."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ..errors import PrunerError
from ..models.processes import mean_of


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limit of a training.

    Attributes:
        tokens: tokens to train on, each counted as often as it is read; None for no limit.
        minutes: time to train; None for no limit. The result then depends on the speed of the machine.

    Raises:
        PrunerError: neither is given, or one is not above 0.

    >>> Budget(tokens=1000).part(0.25)
    Budget(tokens=250, minutes=None)
    """

    tokens: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        limits = [limit for limit in (self.tokens, self.minutes) if limit is not None]
        if not limits or not all(0 < limit < float("inf") for limit in limits):
            raise PrunerError(f"a refit cannot train for {self}: give tokens or minutes above 0")

    def part(self, share: float) -> Budget:
        """Return a share of the budget."""
        tokens = None if self.tokens is None else max(1, round(share * self.tokens))
        return Budget(tokens=tokens, minutes=None if self.minutes is None else share * self.minutes)

    def at_most(self, tokens: int) -> Budget:
        """Return the budget, or so many tokens if it has more.

        >>> Budget(tokens=1000).at_most(600), Budget(minutes=2.0).at_most(600)
        (Budget(tokens=600, minutes=None), Budget(tokens=600, minutes=2.0))
        """
        return Budget(tokens=tokens if self.tokens is None else min(tokens, self.tokens), minutes=self.minutes)


@dataclass
class Spending:
    """The part of a budget that is spent.

    >>> spending = Spending(Budget(tokens=100))
    >>> spending.tokens += 30
    >>> spending.share
    0.3
    """

    budget: Budget
    tokens: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.started

    @property
    def share(self) -> float:
        """Share of the budget that is spent, between 0 and 1."""
        shares = [0.0]
        if self.budget.tokens is not None:
            shares.append(self.tokens / self.budget.tokens)
        if self.budget.minutes is not None:
            shares.append(mean_of(self.seconds) / 60 / self.budget.minutes)
        return min(max(shares), 1.0)

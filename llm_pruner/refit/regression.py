"""Ridge regression on token errors, accumulated batch by batch."""

from __future__ import annotations

from typing import Any

import torch

from ..models.arithmetic import exact_arithmetic
from ..models.processes import averaged, mean_of

RIDGES = (1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
LEAST_FACTOR = 1e-3  # of the mean: channels that a norm multiplies by less stay as they are
HELD_OUT = 4  # every 4th batch chooses lambda


class RegressionSums:
    """Sums over tokens that a weighted ridge regression needs.

    With inputs X, errors E and diagonal token weights V: X' V X, X' V E and sum V E^2. A token weighs 1 / |h|^2 by its
    target h, but none more than one whose |h|^2 is ``floor``. What the weight gives is multiplied by ``factors``,
    of shape ``[hidden]`` or ``[1]``, before it is compared, if there are any.
    """

    def __init__(self, floor: float, factors: torch.Tensor | None = None) -> None:
        self.floor, self.factors = max(floor, 1e-12), factors
        self.tokens = 0.0
        self.error = 0.0
        self.inputs: Any = 0
        self.cross: Any = 0

    def add(self, inputs: torch.Tensor, target: torch.Tensor, hidden: torch.Tensor) -> None:
        """Add tokens: inputs of the projection ``[..., inputs]``, target and current hidden states ``[..., hidden]``.

        The error is the difference of the last two.
        """
        x = inputs.flatten(0, -2).float()
        h = target.reshape(-1, target.shape[-1]).float()
        error = h - hidden.reshape(h.shape).float()
        scale = h.square().sum(1, keepdim=True).clamp_min(self.floor).rsqrt()
        x, error = x * scale, error * scale
        self.tokens += len(x)
        self.error += error.square().sum().item()
        with exact_arithmetic(x.device):
            self.inputs = self.inputs + x.T @ x
            self.cross = self.cross + x.T @ error

    def average(self) -> None:
        """Replace the sums by their means over the processes, each of which has tokens of its own."""
        self.tokens, self.error = mean_of(self.tokens), mean_of(self.error)
        if isinstance(self.inputs, torch.Tensor):
            averaged(self.inputs)
            averaged(self.cross)

    def __add__(self, other: RegressionSums) -> RegressionSums:
        total = RegressionSums(self.floor, self.factors)
        for name in ("tokens", "error", "inputs", "cross"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def restricted(self, channels: torch.Tensor, weight: torch.Tensor) -> RegressionSums:
        """Return the sums of some input channels alone, where the error is left by a ``weight`` on these channels.

        Args:
            channels: LongTensor of indices of input channels.
            weight: ``[len(channels), hidden]``; the errors of these sums are those without it.
        """
        part = RegressionSums(self.floor, self.factors)
        weight, cross = self.compared(weight), self.cross[channels]
        part.tokens, part.inputs = self.tokens, self.inputs[channels][:, channels]
        part.cross = cross - part.inputs @ weight
        part.error = self.error - ((cross + part.cross) * weight).sum().item()
        return part

    def solve(self, ridge: float) -> torch.Tensor:
        """Return the change of the weight that minimises the penalised error, ``[inputs, hidden]``."""
        power = self.inputs.diagonal()
        prior = power.clamp_min(power.mean().item() * 1e-3 + 1e-20)
        penalized = self.inputs + torch.diag(ridge * prior)
        factor, failed = torch.linalg.cholesky_ex(penalized)
        rounded = bool(failed.any())  # not positive definite
        change = torch.linalg.solve(penalized, self.cross) if rounded else torch.cholesky_solve(self.cross, factor)
        if self.factors is None:
            return change
        size = self.factors.abs()
        return torch.where(size > LEAST_FACTOR * size.mean(), change / self.factors, 0)

    def gain(self, change: torch.Tensor) -> float:
        """Return the squared error that a change of the weight removes."""
        change = self.compared(change)
        with exact_arithmetic(change.device):
            return (2 * (change * self.cross).sum() - (change * (self.inputs @ change)).sum()).item()

    def compared(self, weight: torch.Tensor) -> torch.Tensor:
        return weight if self.factors is None else weight * self.factors


def best_ridge(fitted: RegressionSums, held_out: RegressionSums) -> tuple[float, float]:
    """Return the lambda that removes most of the held-out error, and the error that it removes.

    The gain has one maximum over lambda, so it is climbed from the middle of the grid: four solutions for ten.
    """
    gains: dict[int, float] = {}

    def gain(i: int) -> float:
        if i not in gains:
            gains[i] = held_out.gain(fitted.solve(RIDGES[i]))
        return gains[i]

    best = RIDGES.index(1.0)
    while True:
        nearby = [i for i in (best, best - 1, best + 1) if 0 <= i < len(RIDGES)]
        better = max(nearby, key=gain)
        if better == best:
            return RIDGES[best], gains[best]
        best = better

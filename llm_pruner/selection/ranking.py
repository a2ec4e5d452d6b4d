"""Ranking: find the least important indices of each unit, or of all units of a kind together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import ceil, prod

import torch

from ..errors import PrunerError
from ..graph.units import CouplingGraph, Unit
from ..importance.scores import Scores

ALIGNMENTS = (128, 64, 32, 16, 8, 1)  # widths in whose multiples kernels for matrix products are fast; 1: any width


def removable_count(unit: Unit, ratio: float) -> int:
    """Return how many of a unit's indices a ratio removes (LLM-Pruner's count), leaving at least the minimum."""
    channels = unit.size * unit.width
    removed = (channels - int(channels * (1 - ratio))) // unit.width
    return min(removed, unit.size - unit.minimum)


def notes_on_experts(units: list[Unit], ratio: float) -> list[str]:
    """Return remarks on layers that keep more experts than a ratio leaves."""
    notes: Counter[str] = Counter()
    for unit in units:
        left = int(unit.size * (1 - ratio))
        kept = _rounded(unit, left, unit.groups)
        if unit.kind == "experts" and kept > left:
            why = "a token is sent to as many" if left < unit.minimum else f"as many in each of {unit.groups} groups"
            notes[f"keep {kept} of {unit.size} experts, not {left}: {why}"] += 1
    return [f"{count} layers {note}" for note, count in notes.items()]


def _rounded(unit: Unit, kept: int, step: int) -> int:
    """Round a kept count up to a multiple of ``step``, at least the unit's minimum and at most all of it."""
    return min(-(-max(kept, unit.minimum) // step) * step, unit.size)


def alignment(unit: Unit, widest: int) -> int:
    """Return the width, ``widest`` at most, in whose multiples kernels are fast at a unit's channels."""
    if unit.kind in ("heads", "query_heads", "experts", "layers"):
        return 1
    return next(w for w in ALIGNMENTS if w == 1 or (w <= widest and unit.size % w == 0 and unit.size >= 32 * w))


def role(unit: Unit) -> tuple[str, int]:
    """Return the key that a unit shares with its counterparts in other layers: name without numbers, and size."""
    return re.sub(r"\d+", "*", unit.name), unit.size


def equalized(units: list[Unit], removals: list[torch.Tensor]) -> list[torch.Tensor]:
    """Cut the removals of units with the same role to the fewest among them; the first indices of each are removed."""
    fewest: dict[tuple[str, int], int] = {}
    for unit, removed in zip(units, removals, strict=True):
        fewest[role(unit)] = min(len(removed), fewest.get(role(unit), len(removed)))
    return [removed[: fewest[role(unit)]] for unit, removed in zip(units, removals, strict=True)]


def rank_locally(
    units: list[Unit], scores: Scores, ratio: float, *, steps: list[int], floor: float
) -> list[torch.Tensor]:
    """Return the indices that each unit loses: those that score least within it.

    Args:
        ratio: share of every unit's indices that goes.
        steps: kept counts become multiples of these, rounded up, unit by unit.
        floor: share of every unit's indices that stays in any case.
    """
    removals = []
    for unit, step in zip(units, steps, strict=True):
        kept = max(unit.size - removable_count(unit, ratio), _least(unit, floor))
        count = unit.size - _rounded(unit, kept, step)
        removals.append(torch.argsort(scores.of(unit, count), stable=True)[:count])
    return removals


def rank_balanced(scores: torch.Tensor, count: int, parts: int) -> torch.Tensor:
    """Return the ``count`` indices that score least, as many in each of ``parts`` equal parts of a unit."""
    width = len(scores) // parts
    order = torch.argsort(scores.view(parts, width), dim=1, stable=True)[:, : count // parts]
    return (order + width * torch.arange(parts)[:, None]).flatten()


def most_removable(unit: Unit, scores: torch.Tensor, *, parts: int, step: int) -> int:
    """Return how many indices a unit can lose, as many in each of equal parts, while all that score infinity stay.

    Args:
        scores: ``[unit.size]``.
        step: the kept count is a multiple of it.
    """
    free = int((~scores.isposinf()).view(parts, -1).sum(1).min())
    return unit.size - _rounded(unit, unit.size - parts * free, step)


def by_block(scores: Scores, graph: CouplingGraph) -> Scores:
    """Give every index the mean score of its block, so that a stable sort ranks blocks as a whole."""
    blocks = {unit.name: unit.block for unit in graph.units if unit.block > 1 and unit.name in scores.values}
    means = {
        name: scores.values[name].view(-1, block).mean(1).repeat_interleave(block) for name, block in blocks.items()
    }
    return replace(scores, values={**scores.values, **means}) if means else scores


def _mean(scores: torch.Tensor) -> torch.Tensor:
    """Return the mean of the finite scores; removed indices, and those that must stay, have infinite ones."""
    finite = scores[torch.isfinite(scores)]
    return finite.mean().clamp_min(torch.finfo(torch.float64).tiny) if finite.numel() else torch.ones(())


# Divisors of a unit's scores, which make units comparable.
NORMALIZERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": torch.ones_like,
    "mean": _mean,
    "sqrt": lambda scores: _mean(scores).sqrt(),
}


def _least(unit: Unit, floor: float) -> int:
    """Return the fewest indices that a unit keeps."""
    return max(unit.minimum, ceil(floor * unit.size))


def index_costs(units: list[Unit], graph: CouplingGraph) -> list[float]:
    """Return the parameters that one index of each unit frees."""
    costs = []
    for unit in units:
        freed = [
            prod(graph.shapes[name]) * (label >= 0).double().mean().item() for (name, _), label in unit.dims.items()
        ]
        costs.append(sum(freed) / unit.size)
    return costs


def rank_globally(
    units: list[Unit],
    scores: Scores,
    ratio: float,
    *,
    steps: list[int],
    floor: float,
    costs: list[float],
    normalizer: Callable[[torch.Tensor], torch.Tensor],
) -> list[torch.Tensor]:
    """Return the indices that each unit loses: those of all units together that score least per parameter.

    Args:
        ratio: share of all parameters of the units that goes; every unit keeps its minimum.
        steps: kept counts become multiples of these, rounded up, unit by unit.
        floor: share of every unit's indices that stays in any case.
        costs: parameters that one index of each unit frees.
        normalizer: divides the scores of a unit, to compare units.
    """
    if not units:
        return []
    if any(scores.values[unit.name].ndim > 1 for unit in units):
        raise PrunerError("these scores depend on how many indices of a unit go: they rank within it, scope='local'")
    budget = sum(removable_count(unit, ratio) * cost for unit, cost in zip(units, costs, strict=True))
    owner = torch.cat([torch.full((unit.size,), i) for i, unit in enumerate(units)])
    index = torch.cat([torch.arange(unit.size) for unit in units])
    values = [scores.of(unit).double() for unit in units]
    # Costs relative to the largest leave the order of units of one size to the scores, to the bit.
    ranked = [v / normalizer(v) / (cost / max(costs)) for v, cost in zip(values, costs, strict=True)]
    order = torch.argsort(torch.cat(ranked), stable=True)
    removed: list[list[int]] = [[] for _ in units]
    for position in order.tolist():
        i = int(owner[position])
        if budget >= 0.999 * costs[i] and len(removed[i]) < units[i].size - _least(units[i], floor):
            removed[i].append(int(index[position]))
            budget -= costs[i]
    removals = []
    for unit, indices, step in zip(units, removed, steps, strict=True):
        kept = _rounded(unit, unit.size - len(indices), step)
        removals.append(torch.tensor(indices[: unit.size - kept], dtype=torch.long))
    return removals

"""How much has to go for a model to be of a certain size: solved, not guessed."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod

from ..errors import PrunerError
from ..graph import CouplingGraph
from .plan import PruningPlan

SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
STEPS = 30  # of bisection
NEAR = 0.005  # how far below its target a plan may stay


def parameters(graph: CouplingGraph, plan: PruningPlan | None = None) -> int:
    """Parameters of the model that a plan leaves (tied ones once); of the model as it is without a plan."""
    plan = plan or PruningPlan()
    return sum(prod(plan.cut_shape(name, shape)) for name, shape in graph.shapes.items())


def wanted_parameters(graph: CouplingGraph, target: float | str) -> int:
    """A target as a count: a fraction of the model up to 1, or a number, with K, M or B for short.

    Raises:
        PrunerError: it is neither, or not below the model's own size.
    """
    whole = parameters(graph)
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMB]?)\s*", str(target), flags=re.IGNORECASE)
    if not found:
        raise PrunerError(f"target_params {target!r} is no size: give a fraction such as 0.8, or a count such as 5.4B")
    number, suffix = float(found[1]), found[2].upper()
    count = int(number * whole) if number <= 1 and not suffix else int(number * SUFFIXES[suffix])
    if not 0 < count < whole:
        raise PrunerError(f"target_params {target} is {count:,} parameters; the model has {whole:,}: give fewer")
    return count


def solve(graph: CouplingGraph, target: float | str, plan_at: Callable[[float], PruningPlan]) -> PruningPlan:
    """The plan of the smallest ratio that leaves no more parameters than ``target``, and at most 0.5% fewer.

    Args:
        plan_at: the plan at a ratio; it may raise PrunerError where nothing is removed.

    Raises:
        PrunerError: no ratio comes so near; the message names the nearest size that can be reached.
    """
    wanted = wanted_parameters(graph, target)

    def at(ratio: float) -> PruningPlan | None:
        try:
            return plan_at(ratio)
        except PrunerError as error:
            if "removes nothing" not in str(error):
                raise
            return None

    low, high = 0.0, 1 - 1e-6
    best = at(high)
    if best is None or parameters(graph, best) > wanted:
        least = parameters(graph, best)
        raise PrunerError(
            f"target_params {target} ({wanted:,}) cannot be reached: with all that may go gone, {least:,} "
            "parameters stay; prune more kinds or layers"
        )
    for _ in range(STEPS):
        middle = (low + high) / 2
        plan = at(middle)
        if plan is not None and parameters(graph, plan) <= wanted:
            high, best = middle, plan
        else:
            low = middle
    best, above = _between(graph, at(low), best, wanted)
    found = parameters(graph, best)
    if found < wanted * (1 - NEAR):
        raise PrunerError(
            f"target_params {target} ({wanted:,}) cannot be met within {NEAR:.1%}: units go whole, and the nearest "
            f"sizes are {found:,} and {above:,}; give one of these"
        )
    best.settings["target_params"] = target
    return best


def _between(graph: CouplingGraph, more: PruningPlan | None, less: PruningPlan, wanted: int) -> tuple[PruningPlan, int]:
    """The largest plan within ``wanted`` that takes some units from ``more`` and the last ones from ``less``.

    Where every unit loses an index at once, steps are coarse; this makes them those of one unit. Also returns the size
    of the next larger one.
    """
    names = [name for name in less.units if more is None or not _same(more, less, name)]
    above = parameters(graph, more)
    for count in range(1, len(names)):
        plan = PruningPlan(settings=dict(less.settings), notes=list(less.notes))
        taken = set(names[-count:])
        for unit in graph.units:
            source = less if unit.name in taken else more
            if source is not None and unit.name in source.units:
                plan.keep(unit, source.units[unit.name].kept, graph.shapes)
                plan.units[unit.name] = source.units[unit.name]
        size = parameters(graph, plan)
        if size <= wanted:
            return plan, above
        above = size
    return less, above


def _same(one: PruningPlan, other: PruningPlan, name: str) -> bool:
    return name in one.units and one.units[name].kept.tolist() == other.units[name].kept.tolist()

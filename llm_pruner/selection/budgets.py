"""Target sizes and costs: solve for the ratio that meets them."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from math import prod

from ..errors import PrunerError
from ..graph.units import CouplingGraph
from .plan import PruningPlan

COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
MICROSECONDS = {"US": 1, "MS": 10**3, "S": 10**6}
UNITS = {
    "target_params": COUNTS,
    "target_macs": COUNTS,
    "target_memory": BYTES,
    "target_latency": MICROSECONDS,
}  # suffixes of a target with their factors, by its name
STEPS = 30  # of bisection
NEAR = 0.005  # how far below its target a plan may stay


@dataclass
class Budget:
    """Largest cost that a pruned model may have.

    Attributes:
        name: name of the target, as the user gave it: ``target_params``.
        target: value of the target, as the user gave it: ``0.8``, ``5.4B``, ``6GiB``.
        measure: function from a plan to the cost of the model that it leaves.
        units: suffixes that a target may have, with their factors; one of :data:`UNITS`.
        noun: unit of the cost in words, such as ``parameters``.
        whole: cost that a fraction refers to, if not that of the model at hand.
    """

    name: str
    target: float | str
    measure: Callable[[PruningPlan], float]
    units: dict[str, int]
    noun: str
    whole: float | None = None

    def limit(self) -> float:
        """Return the target as a number: a fraction of the whole model's cost up to 1, or an amount.

        Raises:
            PrunerError: the target is neither a fraction nor an amount, or not below the model's own cost.
        """
        number, factor = read_target(self.name, self.target, self.units)
        now = self.measure(PruningPlan())
        whole = now if self.whole is None else self.whole
        amount = number * (whole if factor is None else factor)
        if not 0 < amount < now:
            raise PrunerError(
                f"--{self.name} {self.target} is {amount:,.0f}; the model has {now:,.0f} {self.noun}: give less"
            )
        return amount

    def met_by(self, plan: PruningPlan) -> bool:
        """Return True if the model that a plan leaves costs no more than the target."""
        return self.measure(plan) <= self.limit()


def read_target(name: str, target: float | str, units: dict[str, int]) -> tuple[float, int | None]:
    """Return the number in a target and the factor of its suffix; the factor is None for a fraction.

    >>> read_target("target_params", "5.4B", COUNTS), read_target("target_params", "80%", COUNTS)
    ((5.4, 1000000000), (0.8, None))

    Raises:
        PrunerError: the target is neither a fraction nor an amount.
    """
    parsed = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%|[A-Za-z]*)\s*", str(target))
    suffix = parsed[2].upper() if parsed else ""
    number = float(parsed[1]) if parsed else 0.0
    if suffix == "%":
        number, suffix = number / 100, ""
        is_fraction, is_amount = number <= 1, False
    else:
        is_fraction = not suffix and number <= 1
        is_amount = suffix in units and (bool(suffix) or number.is_integer())
    if number > 0 and (is_fraction or is_amount):
        return number, None if is_fraction else units[suffix]
    above = f"{number:g} is above 1; " if parsed and not suffix and number > 1 else ""
    suffixes = ", ".join(unit for unit in units if unit)
    raise PrunerError(
        f"--{name} {str(target)!r} is not valid: {above}use a fraction between 0 and 1 (0.8 or 80%) or an amount "
        f"(suffixes: {suffixes})"
    )


def parameters(graph: CouplingGraph, plan: PruningPlan | None = None) -> int:
    """Return the parameters of the model that a plan leaves (tied ones once); without a plan, of the model as it is."""
    plan = plan or PruningPlan()
    return sum(prod(plan.cut_shape(name, shape)) for name, shape in graph.shapes.items())


def parameter_budget(graph: CouplingGraph, target: float | str) -> Budget:
    return Budget("target_params", target, lambda plan: parameters(graph, plan), COUNTS, "parameters")


def solve(
    graph: CouplingGraph,
    budget: Budget,
    plan_at: Callable[[float], PruningPlan],
    together: Callable[[str], Hashable] | None = None,
) -> PruningPlan:
    """Return the plan of the smallest ratio whose cost is within the budget, and at most 0.5% below it.

    Args:
        plan_at: function from a ratio to a plan; it may raise :class:`NothingRemoved`.
        together: function from a unit's name to a key; units with equal keys take their next step together. None: each
            unit on its own.

    Raises:
        PrunerError: no ratio meets the budget that closely; the message names the nearest costs that can be reached.
    """
    limit = budget.limit()
    cost_by_counts: dict[tuple[tuple[str, int], ...], float] = {}

    def cost(plan: PruningPlan | None) -> float:
        plan = plan or PruningPlan()
        counts = _counts(plan)
        if counts not in cost_by_counts:
            cost_by_counts[counts] = budget.measure(plan)
        return cost_by_counts[counts]

    def at(ratio: float) -> PruningPlan | None:
        try:
            return plan_at(ratio)
        except NothingRemoved:
            return None

    low, high = 0.0, 1 - 1e-6
    more, less = None, at(high)
    if less is None or cost(less) > limit:
        raise PrunerError(
            f"{budget.name} {budget.target} ({limit:,.0f}) cannot be reached: with everything prunable "
            f"removed, {cost(less):,.0f} {budget.noun} stay; prune more kinds (--kinds heads,neurons) or remove layers "
            "first (--num_layers)"
        )
    for _ in range(STEPS):
        middle = (low + high) / 2
        plan = at(middle)
        if plan is not None and cost(plan) <= limit:
            high, less = middle, plan
        else:
            low, more = middle, plan
    best, above = _finest_mixture(graph, more, less, lambda plan: cost(plan) <= limit, together)
    if cost(best) < limit * (1 - NEAR):
        raise NotMet(
            f"{budget.name} {budget.target} ({limit:,.0f}) cannot be met within {NEAR:.1%}: the nearest costs in "
            f"whole units are {cost(best):,.0f} and {cost(above):,.0f} {budget.noun}; give one of these",
            above or PruningPlan(),
            {name for name in best.units if above is None or not _keep_alike(best, above, name)},
        )
    best.settings[budget.name] = budget.target
    return best


class NothingRemoved(PrunerError):
    """Error: the ratio is so small that no unit loses an index."""


class NotMet(PrunerError):
    """Error: units are removed in steps too large to come close to a target.

    Attributes:
        above: plan whose next step would meet the target.
        step: names of the units that lose indices in that step.
    """

    def __init__(self, message: str, above: PruningPlan, step: set[str]):
        super().__init__(message)
        self.above, self.step = above, step


def _counts(plan: PruningPlan) -> tuple[tuple[str, int], ...]:
    return tuple((name, choice.kept.numel()) for name, choice in plan.units.items())


def _finest_mixture(
    graph: CouplingGraph,
    more: PruningPlan | None,
    less: PruningPlan,
    fits: Callable[[PruningPlan | None], bool],
    together: Callable[[str], Hashable] | None,
) -> tuple[PruningPlan, PruningPlan | None]:
    """Return the largest plan that ``fits`` and takes its last units from ``less`` and the others from ``more``,
    and the next larger plan.

    Where every unit loses an index at once, the steps of a ratio are coarse; these are the steps of one unit, or of
    units that go together.
    """
    changed = [name for name in less.units if more is None or not _keep_alike(more, less, name)]
    steps: dict[Hashable, list[str]] = {}
    for name in changed:
        steps.setdefault(together(name) if together else name, []).append(name)

    def mixed(count: int) -> PruningPlan | None:
        if count == 0:
            return more
        if count == len(steps):
            return less
        plan = PruningPlan(settings=dict(less.settings), notes=list(less.notes))
        taken = {name for names in list(steps.values())[-count:] for name in names}
        for unit in graph.units:
            source = less if unit.name in taken else more
            if source is not None and unit.name in source.units:
                plan.keep(unit, source.units[unit.name].kept, graph.shapes)
                plan.units[unit.name] = source.units[unit.name]
        return plan

    too_few, enough = 0, len(steps)
    while enough - too_few > 1:
        count = (too_few + enough) // 2
        if fits(mixed(count)):
            enough = count
        else:
            too_few = count
    return mixed(enough) or less, mixed(too_few)


def _keep_alike(one: PruningPlan, other: PruningPlan, name: str) -> bool:
    both = name in one.units and name in other.units
    return both and one.units[name].kept.tolist() == other.units[name].kept.tolist()

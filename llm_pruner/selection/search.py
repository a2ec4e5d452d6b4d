"""Search over widths: evolution of the number of indices that each unit keeps, under a budget.

As in EvoPress (arXiv 2410.14649) and DarwinLM (arXiv 2502.07780), a parent has offspring that narrow some units and
widen others, so that the cost stays. Offspring are compared on a part of the samples, the best of them on all, and the
best of these becomes the parent if it is closer to the original. What "close" means is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from ..errors import PrunerError
from ..graph.units import CouplingGraph, Unit
from ..progress import track
from .budgets import Budget
from .plan import PruningPlan
from .ranking import role

ALLOCATION = "allocation"  # setting of a plan that holds the record of its search
RUNGS = 8  # widths of a unit, evenly spaced, besides that of the starting point
OFFSPRING = 8  # of a generation
FINALISTS = 2  # offspring of a generation that are compared on all samples
PART = 0.25  # share of the samples on which all offspring are compared
LARGEST_MUTATION = 3  # pairs of units that exchange a rung at most
TRIES = 20  # mutations that are drawn for an offspring that was not there before

Genome = tuple[int, ...]  # index of a width by gene
Distance = Callable[[Genome, float], float]  # genome and share of the samples -> distance from the original
PlanAt = Callable[[Mapping[str, int]], PruningPlan]  # kept counts by unit -> plan


@dataclass(frozen=True, kw_only=True)
class Gene:
    """A width that is searched: that of one unit, or of units that stay alike.

    Attributes:
        units: the units.
        step: kept counts are multiples of it, or all indices.
        widths: kept counts to choose from, ascending.
        costs: cost of the model at each of these counts, with all other units as at the starting point.
    """

    units: tuple[Unit, ...]
    step: int
    widths: tuple[int, ...]
    costs: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Widths to choose from, and their costs.

    Costs of units are added up; :meth:`finish` measures the cost of the result.

    Attributes:
        start: genome of the starting point.
        cost: cost of the starting point.
        limit: largest cost.
        plan_at: function from kept counts to a plan.
    """

    genes: tuple[Gene, ...]
    start: Genome
    cost: float
    limit: float
    budget: Budget
    plan_at: PlanAt

    def widths(self, genome: Genome) -> dict[str, int]:
        """Return the kept count of every unit."""
        return {unit.name: gene.widths[i] for gene, i in zip(self.genes, genome, strict=True) for unit in gene.units}

    def cost_of(self, genome: Sequence[int]) -> float:
        """Return the cost of a genome, as far as costs of units add up."""
        return self.cost + sum(gene.costs[i] - self.cost for gene, i in zip(self.genes, genome, strict=True))

    def mutated(self, genome: Genome, random: Random) -> Genome:
        """Return a genome in which a few genes exchange rungs, as close below the limit as rungs allow.

        The same genome is returned where measured costs, such as latencies, leave none below the limit.
        """
        changed = list(genome)
        for _ in range(min(random.randint(1, LARGEST_MUTATION) for _ in range(2))):  # small ones more often
            narrowed = self._move(changed, -1, range(len(changed)), random)
            self._move(changed, 1, [i for i in range(len(changed)) if i != narrowed], random)
        while self.cost_of(changed) > self.limit:
            if self._move(changed, -1, range(len(changed)), random) is None:
                return genome
        while self._move(changed, 1, [i for i in range(len(changed)) if self._fits(changed, i)], random) is not None:
            pass
        return tuple(changed)

    def _move(self, genome: list[int], by: int, among: Iterable[int], random: Random) -> int | None:
        """Move one gene of those named to the next rung; return which, None if none can move."""
        movable = [i for i in among if 0 <= genome[i] + by < len(self.genes[i].widths)]
        if not movable:
            return None
        chosen = random.choice(movable)
        genome[chosen] += by
        return chosen

    def _fits(self, genome: Sequence[int], i: int) -> bool:
        """Return True if the next rung of a gene stays within the limit."""
        wider = [*genome]
        wider[i] += 1
        return wider[i] < len(self.genes[i].widths) and self.cost_of(wider) <= self.limit

    def finish(self, genome: Genome) -> PruningPlan:
        """Return the plan of a genome, with what is left of the budget spent in steps finer than rungs.

        Raises:
            PrunerError: no plan near the genome meets the budget.
        """
        limit = self.limit
        for _ in range(TRIES):
            plan = self.plan_at(self._filled(genome, limit))
            if (excess := self.budget.measure(plan) - self.limit) <= 0:
                return plan
            limit -= excess
        raise PrunerError(f"--{self.budget.name} {self.budget.target} is not met by the widths of the search")

    def _filled(self, genome: Genome, limit: float) -> dict[str, int]:
        """Return kept counts near a genome whose added costs come close below a limit."""
        widths, changed = self.widths(genome), list(genome)
        shares = [gene.widths[i] / gene.widths[-1] for gene, i in zip(self.genes, genome, strict=True)]
        order = sorted(range(len(genome)), key=lambda i: -shares[i])
        while self.cost_of(changed) > limit:  # the widest first, and again
            widest = max((i for i in order if changed[i]), key=lambda i: self.genes[i].widths[changed[i]], default=None)
            if widest is None:
                break
            changed[widest] -= 1
            widths = self.widths(tuple(changed))
        slack = limit - self.cost_of(changed)
        for i in reversed(order):  # the narrowest first
            gene, rung = self.genes[i], changed[i]
            if rung + 1 == len(gene.widths):
                continue
            each = (gene.costs[rung + 1] - gene.costs[rung]) / (gene.widths[rung + 1] - gene.widths[rung])
            more = int(slack / each) // gene.step * gene.step if each > 0 else 0
            if 0 < more < gene.widths[rung + 1] - gene.widths[rung]:
                widths |= {unit.name: gene.widths[rung] + more for unit in gene.units}
                slack -= more * each
        return widths


def search_space(
    graph: CouplingGraph,
    units: Sequence[Unit],
    *,
    steps: Mapping[str, int],
    floor: float,
    start: PruningPlan,
    budget: Budget,
    plan_at: PlanAt,
    alike: bool,
) -> SearchSpace:
    """Return the widths that a search chooses from.

    Args:
        units: units whose widths are searched.
        steps: step of the kept counts, by unit.
        floor: share of every unit's indices that stays in any case.
        start: plan that meets the budget.
        plan_at: function from kept counts to a plan.
        alike: let counterparts in all layers have one width.
    """
    groups: dict[object, list[Unit]] = {}
    for unit in units:
        groups.setdefault(role(unit) if alike else unit.name, []).append(unit)
    kept = {unit.name: len(start.units[unit.name].kept) if unit.name in start.units else unit.size for unit in units}
    cost, known = budget.measure(start), dict[object, float]()

    def cost_at(members: Sequence[Unit], count: int) -> float:
        key = (role(members[0]), len(members), kept[members[0].name], count)  # layers of one shape cost the same
        if count == kept[members[0].name]:
            return cost
        if key not in known:
            known[key] = budget.measure(plan_at(kept | {unit.name: count for unit in members}))
        return known[key]

    genes = []
    for members in groups.values():
        unit, step = members[0], steps[members[0].name]
        least = max(unit.minimum, floor * unit.size)
        even = {round(unit.size * k / RUNGS / step) * step for k in range(1, RUNGS + 1)}
        widths = sorted({n for n in even if least <= n <= unit.size} | {kept[unit.name], unit.size})
        costs = tuple(cost_at(members, count) for count in widths)
        genes.append(Gene(units=tuple(members), step=step, widths=tuple(widths), costs=costs))
    return SearchSpace(
        genes=tuple(genes),
        start=tuple(gene.widths.index(kept[gene.units[0].name]) for gene in genes),
        cost=cost,
        limit=budget.limit(),
        budget=budget,
        plan_at=plan_at,
    )


@dataclass(frozen=True, kw_only=True)
class Evolution:
    """Outcome of :func:`evolve`.

    Attributes:
        best: genome that is closest to the original.
        distances: distance of the parent, at the start and after every generation.
    """

    best: Genome
    distances: list[float] = field(default_factory=list)


def evolve(space: SearchSpace, distance: Distance, *, generations: int, seed: int) -> Evolution:
    """Search for the genome with the least distance; the same arguments give the same result."""
    random = Random(seed)
    parent = space.start
    distances = [distance(parent, 1.0)]
    seen = {parent}
    for _ in track(range(generations), "searching widths"):
        offspring: list[Genome] = []
        for _ in range(OFFSPRING):
            fresh = (g for g in (space.mutated(parent, random) for _ in range(TRIES)) if g not in seen)
            if (genome := next(fresh, None)) is not None:
                offspring.append(genome)
                seen.add(genome)
        finalists = sorted(offspring, key=lambda genome: distance(genome, PART))[:FINALISTS]
        best = min(finalists, key=lambda genome: distance(genome, 1.0), default=parent)
        if (value := distance(best, 1.0)) < distances[-1]:
            parent = best
        distances.append(min(value, distances[-1]))
    return Evolution(best=parent, distances=distances)

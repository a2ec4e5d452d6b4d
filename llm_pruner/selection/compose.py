"""Compose two plans, applied one after the other, into one."""

from __future__ import annotations

import torch

from ..errors import PrunerError
from ..graph.units import CouplingGraph
from ..importance.scores import Scores
from .plan import EXPLANATION, PruningPlan, name_after


def compose_plans(first: PruningPlan, graph: CouplingGraph, then: PruningPlan, left: CouplingGraph) -> PruningPlan:
    """Return one plan with the effect of ``first`` and then ``then``.

    Args:
        first: plan for the original model.
        graph: graph of the original model.
        then: plan for the model that ``first`` leaves; it cuts widths only, no layers or blocks.
        left: graph of the model that ``first`` leaves.

    Raises:
        PrunerError: a unit of ``then`` is not a unit of the original model.
    """
    old_names = {new: name for name in graph.shapes if (new := name_after(name, first)) is not None}
    owners = {(name, dim): [] for unit in graph.units for name, dim in unit.dims}  # type: dict[tuple[str, int], list]
    for unit in graph.units:
        for key in unit.dims:
            owners[key].append(unit)
    plan = PruningPlan(settings=first.settings | then.settings, notes=[*first.notes, *then.notes])
    kept = {name: first.units[name].kept for name in first.units}
    why = dict(first.units)
    for name, choice in then.units.items():
        where = [(old_names[parameter], dim) for parameter, dim in left.unit(name).dims]
        found = [
            unit
            for unit in owners.get(where[0], [])
            if len(kept.get(unit.name, range(unit.size))) == choice.size and all(key in unit.dims for key in where)
        ]
        # A key-value head that is left alone gives its name to the query heads in it.
        found.sort(key=lambda unit: (unit.kind != choice.kind, len(unit.dims)))
        if not found:
            raise PrunerError(f"the model that the first plan is for has no unit {name}")
        unit = found[0]
        before = kept.get(unit.name)
        kept[unit.name] = choice.kept if before is None else before[choice.kept]
        why[unit.name] = choice
    for path in first.blocks:
        plan.drop_block(path, graph.shapes)
    for unit in graph.units:
        if unit.name in kept:
            plan.keep(unit, kept[unit.name], graph.shapes)
            for field in EXPLANATION:
                setattr(plan.units[unit.name], field, getattr(why[unit.name], field))
    return plan


def scores_in_original(scores: Scores, graph: CouplingGraph, plan: PruningPlan) -> Scores:
    """Express the scores of a pruned model in the indices of the original; indices already removed get -inf.

    Args:
        scores: of the model that ``plan`` left.
        graph: of the original model.
    """
    values = {}
    for unit in graph.units:
        found = scores.values.get(unit.name)
        if unit.name not in plan.units:
            if found is not None:
                values[unit.name] = found
            continue
        kept = plan.units[unit.name].kept
        value = torch.full((unit.size,), -torch.inf, dtype=torch.float64)
        # An axis with one index left is no unit any more, and that index stays.
        value[kept] = found if found is not None and len(found) == len(kept) else torch.inf
        values[unit.name] = value
    return Scores(values, scores.settings)

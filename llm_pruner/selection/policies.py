"""From scores to a plan: how many indices each unit loses, and which."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import ceil, lcm, prod

import torch

from ..errors import PrunerError
from ..graph import KINDS, CouplingGraph, Unit
from ..importance import Scores
from .budgets import Budget, NothingRemoved, NotMet, parameter_budget, solve
from .plan import PruningPlan

LayerChoice = Iterable[int] | Mapping[str, Iterable[int]] | None


def select(
    graph: CouplingGraph,
    scores: Scores,
    ratio: float = 0.25,
    kinds: Iterable[str] = ("heads", "neurons"),
    layers: LayerChoice = None,
    scope: str = "local",
    round_to: int = 1,
    target_params: float | str | None = None,
    budget: Budget | None = None,
    normalize: str = "none",
    floor: float = 0.0,
    align: bool = False,
    tensor_parallel: int = 1,
) -> PruningPlan:
    """Choose which indices of which units stay: those with the highest scores.

    Args:
        graph: from :func:`llm_pruner.trace`.
        scores: from :func:`llm_pruner.score`; ``scores.values[unit.name]`` is a tensor ``[unit.size]``.
        ratio: share of a unit's indices to remove, strictly between 0 and 1. As LLM-Pruner counts: a unit
            of n channels loses ``n - int(n * (1 - ratio))``, in whole indices, rounded down. None is a valid
            outcome for a unit with few heads, and the plan's notes say so.
        kinds: kinds of units to prune.
        layers: layer indices to prune in, None for all; or a mapping from kind to layer indices (a kind without an
            entry is pruned everywhere). ``hidden``, ``vocabulary`` and ``layers`` do not ask; other units that span
            layers are left out when layers are given.
        scope: ``local`` takes the ratio from every unit, ``global`` from all units of a kind together: first what
            scores least for each parameter that it frees.
        round_to: kept counts become multiples of this, and of the unit's own ``multiple``, rounded up.
        target_params: instead of a ratio, the parameters that stay: a fraction of the model, or a count such as
            ``"5.4B"``. The ratio is solved so that the plan leaves at most that many, and at most 0.5% fewer.
        budget: the same for another cost (:func:`llm_pruner.evaluation.macs_budget`, ``memory_budget``).
        normalize: what global scores are divided by to compare layers: ``none``, ``mean`` (the mean of their unit) or
            ``sqrt`` (the root of that).
        floor: share of every unit's indices that stays in any case, at least 0 and below 1.
        align: keep widths multiples of 8 to 128 channels, as kernels for matrix products want them: of the largest
            power of two that divides a unit's size and leaves it at least 32 steps. Heads go as they are.
        tensor_parallel: keep heads, neurons and channels in multiples of this many, and as many of them in each of as
            many equal parts of a unit, so that a model split over that many devices stays so.

    Raises:
        PrunerError: an argument is out of range, or there is nothing to prune.
    """
    kinds = tuple(kinds)
    if target_params is not None:
        budget = parameter_budget(graph, target_params)
    if budget is not None:

        def solved(align: bool) -> PruningPlan:
            def at(share: float) -> PruningPlan:
                choice = (share, kinds, layers, scope, round_to, None, None, normalize, floor, align, tensor_parallel)
                return select(graph, scores, *choice)

            return solve(graph, budget, at)

        try:
            return solved(align)
        except NotMet:
            if not align:
                raise
            plan = solved(align=False)
            plan.notes.append("widths are not aligned: in steps that kernels like, the target cannot be met")
            return plan
    wanted = _by_kind(layers, kinds)
    _check(graph, ratio, kinds, wanted, scope, round_to)
    if normalize not in NORMALIZERS:
        raise PrunerError(f"unknown normalize {normalize!r}; choose from {', '.join(NORMALIZERS)}")
    if tensor_parallel < 1:
        raise PrunerError(f"tensor_parallel {tensor_parallel} is out of range: give 1 or more")
    if not 0 <= floor < 1:
        raise PrunerError(f"floor {floor} is out of range: give a share of at least 0 and below 1")
    chosen = [unit for unit in graph.of_kind(*kinds) if _in_layers(unit, wanted)]
    if not chosen:
        raise PrunerError(_nothing(graph, kinds, wanted))
    for unit in chosen:
        if unit.name not in scores.values or len(scores.values[unit.name]) != unit.size:
            raise PrunerError(
                f"there are no scores [{unit.size}] for {unit.name}: score this model, with kinds={kinds}"
            )
    plan = PruningPlan(
        settings={"ratio": ratio, "kinds": list(kinds), "scope": scope, "round_to": round_to, **scores.settings}
    )
    for kind in kinds:
        units = [unit for unit in chosen if unit.kind == kind]
        if spanning := [u for u in graph.of_kind(kind) if u.layer is None and u not in units]:
            plan.notes.append(f"{kind}: {len(spanning)} units span layers and are left out, since layers were given")
        parts = tensor_parallel if kind in SHARDED else 1
        steps = [lcm(round_to, parts, unit.multiple, _alignment(unit) if align else 1) for unit in units]
        if scope == "local":
            removals = _local(units, scores, ratio, steps, floor)
        else:
            removals = _global(units, scores, ratio, steps, floor, _costs(units, graph), NORMALIZERS[normalize])
        idle = 0
        for unit, removed in zip(units, removals, strict=True):
            if unit.size % parts:
                plan.notes.append(f"{unit.name} has {unit.size} indices, which {parts} devices cannot share equally")
            elif parts > 1:
                removed = _balanced(scores.values[unit.name], len(removed), parts)
            if removed.numel():
                stays = torch.ones(unit.size, dtype=torch.bool)
                stays[removed] = False
                plan.keep(unit, stays.nonzero().flatten(), graph.shapes)
                plan.units[unit.name].explain(scores.values[unit.name])
            else:
                idle += 1
        if idle:
            plan.notes.append(
                f"{kind}: {idle} of {len(units)} units lose nothing at ratio {ratio} "
                f"({units[0].size} indices in the first)"
            )
    if not plan.units:
        sizes = sorted({unit.size for unit in chosen})
        raise NothingRemoved(
            f"ratio {ratio} removes nothing: the units have {', '.join(map(str, sizes))} indices, which go whole; "
            "raise the ratio"
        )
    return plan


def removable(unit: Unit, ratio: float) -> int:
    """How many of a unit's indices a ratio removes (LLM-Pruner's count), leaving at least the minimum."""
    channels = unit.size * unit.width
    removed = (channels - int(channels * (1 - ratio))) // unit.width
    return min(removed, unit.size - unit.minimum)


def _rounded(unit: Unit, kept: int, step: int) -> int:
    """A kept count as a multiple of ``step``, at least the unit's minimum and at most all of it."""
    return min(-(-max(kept, unit.minimum) // step) * step, unit.size)


def _alignment(unit: Unit) -> int:
    """The width in whose multiples kernels like a unit's channels."""
    if unit.kind in ("heads", "query_heads", "experts", "layers"):
        return 1
    fits = (width for width in (128, 64, 32, 16, 8) if unit.size % width == 0 and unit.size >= 32 * width)
    return next(fits, 1)


def _local(units: list[Unit], scores: Scores, ratio: float, steps: list[int], floor: float) -> list[torch.Tensor]:
    out = []
    for unit, step in zip(units, steps, strict=True):
        kept = max(unit.size - removable(unit, ratio), _least(unit, floor))
        gone = unit.size - _rounded(unit, kept, step)
        out.append(torch.argsort(scores.values[unit.name], stable=True)[:gone])
    return out


def _balanced(scores: torch.Tensor, count: int, parts: int) -> torch.Tensor:
    """The indices that score least in each of so many equal parts of a unit, together ``count``."""
    width = len(scores) // parts
    order = torch.argsort(scores.view(parts, width), dim=1, stable=True)[:, : count // parts]
    return (order + width * torch.arange(parts)[:, None]).flatten()


# What the scores of a unit are divided by before they are compared with those of others.
NORMALIZERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": torch.ones_like,
    "mean": lambda scores: _mean(scores),
    "sqrt": lambda scores: _mean(scores).sqrt(),
}


def _mean(scores: torch.Tensor) -> torch.Tensor:
    """The mean of what has a score; what has gone in an earlier step, or must stay, has an infinite one."""
    known = scores[torch.isfinite(scores)]
    return known.mean().clamp_min(torch.finfo(torch.float64).tiny) if known.numel() else torch.ones(())


def _least(unit: Unit, floor: float) -> int:
    """The fewest indices that a unit keeps."""
    return max(unit.minimum, ceil(floor * unit.size))


def _costs(units: list[Unit], graph: CouplingGraph) -> list[float]:
    """Parameters that go with one index of each unit."""
    out = []
    for unit in units:
        freed = [
            prod(graph.shapes[name]) * (label >= 0).double().mean().item() for (name, _), label in unit.dims.items()
        ]
        out.append(sum(freed) / unit.size)
    return out


def _global(
    units: list[Unit],
    scores: Scores,
    ratio: float,
    steps: list[int],
    floor: float,
    costs: list[float],
    normalizer: Callable[[torch.Tensor], torch.Tensor],
) -> list[torch.Tensor]:
    """Remove the indices of all units together that score least per parameter; every unit keeps its minimum."""
    if not units:
        return []
    budget = sum(removable(unit, ratio) * cost for unit, cost in zip(units, costs, strict=True))
    owner = torch.cat([torch.full((unit.size,), i) for i, unit in enumerate(units)])
    index = torch.cat([torch.arange(unit.size) for unit in units])
    values = [scores.values[unit.name].double() for unit in units]
    # Costs relative to the largest leave the order of units of one size to the scores, to the bit.
    ranked = [v / normalizer(v) / (cost / max(costs)) for v, cost in zip(values, costs, strict=True)]
    order = torch.argsort(torch.cat(ranked), stable=True)
    removed: list[list[int]] = [[] for _ in units]
    for position in order.tolist():
        i = int(owner[position])
        if budget >= 0.999 * costs[i] and len(removed[i]) < units[i].size - _least(units[i], floor):
            removed[i].append(int(index[position]))
            budget -= costs[i]
    out = []
    for unit, gone, step in zip(units, removed, steps, strict=True):
        kept = _rounded(unit, unit.size - len(gone), step)
        out.append(torch.tensor(gone[: unit.size - kept], dtype=torch.long))
    return out


SHARDED = ("heads", "neurons", "channels")  # what tensor parallelism splits
WHOLE_MODEL = ("hidden", "vocabulary", "layers")


def _by_kind(layers: LayerChoice, kinds: tuple[str, ...]) -> dict[str, set[int]] | None:
    """The layers asked for, for each kind; None for no restriction."""
    if layers is None:
        return None
    if not isinstance(layers, Mapping):
        every = set(layers)
        return {kind: every for kind in kinds}
    unknown = [kind for kind in layers if kind not in KINDS]
    if unknown:
        raise PrunerError(f"layers are given for the unknown kind {unknown[0]!r}; choose from {', '.join(KINDS)}")
    return {kind: set(chosen) for kind, chosen in layers.items()}


def _in_layers(unit: Unit, wanted: dict[str, set[int]] | None) -> bool:
    """A kind without an entry is not restricted; units of the whole model do not ask."""
    if wanted is None or unit.kind in WHOLE_MODEL or unit.kind not in wanted:
        return True
    return unit.layer in wanted[unit.kind]


def _check(
    graph: CouplingGraph,
    ratio: float,
    kinds: tuple[str, ...],
    wanted: dict[str, set[int]] | None,
    scope: str,
    round_to: int,
) -> None:
    if not 0 < ratio < 1:
        raise PrunerError(f"ratio {ratio} is out of range: give a share between 0 and 1, both excluded")
    for kind in kinds:
        if kind not in KINDS:
            raise PrunerError(f"unknown kind {kind!r}; choose from {', '.join(KINDS)}")
    if scope not in ("local", "global"):
        raise PrunerError(f"unknown scope {scope!r}; choose local or global")
    if round_to < 1:
        raise PrunerError(f"round_to {round_to} is out of range: give 1 or more")
    present = {unit.layer for unit in graph.units if unit.layer is not None}
    missing = sorted(set().union(*(wanted or {}).values()) - present)
    if missing:
        top = f"layers 0 to {max(present)}" if present else "no layers"
        raise PrunerError(f"layer {', '.join(map(str, missing))} out of range: the model has {top} that can be pruned")


def _nothing(graph: CouplingGraph, kinds: tuple[str, ...], wanted: object) -> str:
    there = ", ".join(sorted({unit.kind for unit in graph.units})) or "none"
    where = "" if wanted is None else " in the layers given"
    return f"nothing to prune: no unit of kind {', '.join(kinds)}{where} (kinds found: {there})"


def first_layers(graph: CouplingGraph, count: int) -> PruningPlan:
    """Keep the first ``count`` layers of the model's stack (LLM-Pruner's ``--layer_wise``).

    Raises:
        PrunerError: the model has no single stack, or ``count`` is not in 1 .. size - 1.
    """
    stacks = graph.of_kind("layers")
    if len(stacks) != 1:
        raise PrunerError(f"the model has {len(stacks)} stacks of layers; which one to cut is not decided")
    (unit,) = stacks
    if not 0 < count < unit.size:
        raise PrunerError(f"cannot keep the first {count} layers of {unit.size}: give 1 to {unit.size - 1}")
    plan = PruningPlan(settings={"layers_kept": count})
    plan.keep(unit, torch.arange(count), graph.shapes)
    return plan


def lifted(scores: Scores, graph: CouplingGraph, plan: PruningPlan) -> Scores:
    """Scores of a pruned model as scores of the original: what is gone scores lowest, so it goes again.

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

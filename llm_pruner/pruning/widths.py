"""Choose the widths of a pruning run: which kinds of units, in which layers, under which budget, by which scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import PrunerError
from ..evaluation.cost import macs_budget, memory_budget
from ..evaluation.latency import latency_budget
from ..files import digest
from ..graph.units import CouplingGraph
from ..importance.scores import Scores
from ..refit.allocation import search, searched_units
from ..selection.budgets import Budget, NothingRemoved, parameter_budget
from ..selection.plan import PruningPlan
from ..selection.select import select
from .context import Planning
from .presets import default_layers
from .settings import BudgetSettings, PruneSettings, WidthSettings
from .whole_layers import measure_sensitivity, reachable_shape


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A model before layers are removed, and the plan that removes them."""

    model: PreTrainedModel
    graph: CouplingGraph
    dropped: PruningPlan


@dataclass(frozen=True, kw_only=True)
class WidthGoal:
    """Widths to remove: by ``counts`` (and ``config``) for a shape, else by ratio, proportions or budget."""

    kinds: tuple[str, ...]
    layers: Mapping[str, Iterable[int]] | None = None
    proportions: Mapping[str, float] = field(default_factory=dict)
    budget: Budget | None = None
    counts: Mapping[str, int] | None = None
    config: PreTrainedConfig | None = None


def width_goal(planning: Planning, model: PreTrainedModel, graph: CouplingGraph, whole: Whole | None) -> WidthGoal:
    settings, widths = planning.settings, planning.settings.widths
    if settings.shape:
        config, counts = reachable_shape(model, graph, settings.shape)
        kinds = tuple({u.kind: None for u in graph.units if counts.get(u.name, u.size) < u.size})
        if not kinds and config.to_dict() == model.config.to_dict():
            raise NothingRemoved("the model has this shape already")
        if not kinds:
            raise PrunerError("the shape cannot be reached: its weights are as large as the model's, not the same")
        return WidthGoal(kinds=kinds, counts=counts, config=config)
    proportions = {kind: share for kind, share in widths.proportions.items() if kind != "layers"}
    kinds = tuple(proportions) or width_kinds(widths, graph)
    with planning.clock("budget"):
        budget = _budget(settings, model, graph, kinds=kinds, whole=whole)
    if proportions and not all(proportions.values()):
        plans = [PruningPlan(), *([whole.dropped] if whole else [])]
        scores = score_widths(planning, model, graph, kinds, plans=plans)
        with planning.clock("sensitivity"):
            proportions = measure_sensitivity(model, graph, scores, kinds=kinds, ids=planning.ids)
    layers = None if proportions or widths.uniform else width_layers(widths, graph, kinds)
    return WidthGoal(kinds=kinds, layers=layers, proportions=proportions, budget=budget)


def width_kinds(widths: WidthSettings, graph: CouplingGraph) -> tuple[str, ...]:
    """Return the kinds of units whose widths are pruned in a model.

    Raises:
        PrunerError: the model has no unit of a kind that was asked for.
    """
    chosen = tuple(kind for kind in widths.kinds if kind != "layers")
    present = list(dict.fromkeys(unit.kind for unit in graph.units))
    if chosen:
        missing = [kind for kind in chosen if kind not in present]
        if len(missing) == len(chosen):
            raise PrunerError(f"the model has no {' and no '.join(missing)} to prune; it has {', '.join(present)}")
        return chosen
    if widths.preset == "paper":
        return ("heads", "neurons")
    return next(((kind,) for kind in ("neurons", "heads", "channels") if kind in present), ("neurons",))


def width_layers(widths: WidthSettings, graph: CouplingGraph, kinds: tuple[str, ...]) -> dict[str, list[int]] | None:
    """Return the layers that each kind is pruned in: those that ``--block_*`` name, else the preset's.

    Raises:
        PrunerError: a range lies outside the model.
    """
    if set(kinds) == {"hidden"}:
        return None
    numbers = [unit.layer for unit in graph.units if unit.layer is not None]
    if not numbers:
        raise PrunerError("the architecture has no layers in which anything can be pruned")
    count = max(numbers) + 1
    usual, layers = default_layers(widths.preset, count), {}
    for kind, (start, end) in widths.ranges.items():
        present = {unit.layer for unit in graph.of_kind(kind)}
        if not present or (kind == "experts" and (start, end) == (None, None)):
            continue
        first = usual.start if start is None else start
        last = max(usual.stop, first + 1) if end is None else end
        if not 0 <= first < last <= count:
            block = "attention" if "heads" in kind else "mlp"
            raise PrunerError(
                f"--block_{block}_layer_start {first} --block_{block}_layer_end {last} is out of range: the model has "
                f"layers 0 to {count - 1}, and the end is not included"
            )
        # Layers of the range without such a unit, as dense layers before a mixture's, cannot be asked for.
        layers[kind] = [i for i in range(first, last) if i in present]
    return layers


def score_widths(
    planning: Planning,
    model: PreTrainedModel,
    graph: CouplingGraph,
    kinds: tuple[str, ...],
    *,
    plans: list[PruningPlan],
) -> Scores:
    """Score a model that ``plans`` left of the original; they tell its cache from others."""
    return planning.score_widths(model, graph, kinds, _cache_file(planning, kinds, plans))


def select_widths(
    widths: WidthSettings, graph: CouplingGraph, scores: Scores, goal: WidthGoal, *, step: int
) -> PruningPlan:
    """Choose the indices that stay by their scores."""
    return select(
        graph,
        scores,
        ratio=goal.proportions or widths.ratio * step / widths.iterative_steps,
        layers=goal.layers,
        scope=widths.scope,
        budget=goal.budget,
        normalize=widths.normalize,
        counts=goal.counts,
        **_options(widths, goal),
    )


def _options(widths: WidthSettings, goal: WidthGoal) -> dict[str, Any]:
    """Return the arguments that choosing widths by scores and by search share."""
    names = ("round_to", "floor", "align", "tensor_parallel", "uniform")
    return {"kinds": goal.kinds} | {name: getattr(widths, name) for name in names}


def check_search(widths: WidthSettings, graph: CouplingGraph, goal: WidthGoal) -> None:
    """Refuse a search that :func:`search_widths` would refuse, without weights."""
    if widths.generations is not None:
        searched_units(graph, _search_options(widths, goal))


def _search_options(widths: WidthSettings, goal: WidthGoal) -> dict[str, Any]:
    """Return the options of a search: layers are those that flags name, otherwise all."""
    named = {kind for kind, ends in widths.ranges.items() if ends != (None, None)}
    layers = {kind: list(layers) for kind, layers in (goal.layers or {}).items() if kind in named}
    return _options(widths, goal) | {"layers": layers}


def search_widths(
    planning: Planning,
    model: PreTrainedModel,
    graph: CouplingGraph,
    scores: Scores,
    *,
    goal: WidthGoal,
    start: PruningPlan,
    whole: Whole | None,
) -> PruningPlan:
    """Search for widths from a starting point on.

    Raises:
        PrunerError: the model is offloaded or spread, or :func:`llm_pruner.search` raises one.
    """
    settings, widths = planning.settings, planning.settings.widths
    unfinished = settings.output.unfinished
    if settings.model.offload or settings.model.device_map:
        raise PrunerError(
            "--allocate search runs the model hundreds of times, and this one is offloaded or spread over devices: use "
            "--allocate uniform or global"
        )
    assert widths.generations is not None and planning.ids is not None
    kept = next((kept.tolist() for kept in whole.dropped.layers.values()), None) if whole else None
    with planning.clock("search"):
        return search(
            model,
            graph,
            scores,
            planning.ids,
            budget=goal.budget,
            start=start,
            original=whole.model if whole else None,
            kept=kept,
            refit=settings.refit.needs_text,
            generations=widths.generations,
            seed=settings.seed,
            cache=unfinished / "search.safetensors" if unfinished else None,
            **_search_options(widths, goal),
        )


def _cache_file(planning: Planning, kinds: tuple[str, ...], plans: list[PruningPlan]) -> Path | None:
    """Return the file that caches scores, named after a hash of everything that they depend on."""
    scoring = planning.settings.scoring
    folder = scoring.cache or planning.settings.output.unfinished
    if folder is None or scoring.criterion == "random":
        return None
    key = [planning.key, sorted(kinds), [plan.key for plan in plans], scoring.criterion, scoring.taylor]
    return folder / f"{digest(key)}.safetensors"


def _budget(
    settings: PruneSettings,
    model: PreTrainedModel,
    graph: CouplingGraph,
    *,
    kinds: tuple[str, ...],
    whole: Whole | None,
) -> Budget | None:
    """Return the budget; a fraction refers to the cost of ``whole``, before layers are removed."""
    if settings.budget is None:
        return None
    if settings.budget.kind == "target_latency" and settings.model.offload:
        raise PrunerError("--target_latency times a model in memory, and this one is offloaded: give --target_macs")
    budget = _cost_budget(settings.budget, model, graph, kinds)
    if whole is not None:
        budget.whole = _cost_budget(settings.budget, whole.model, whole.graph, kinds).measure(PruningPlan())
    return budget


def _cost_budget(
    budget: BudgetSettings, model: PreTrainedModel, graph: CouplingGraph, kinds: tuple[str, ...]
) -> Budget:
    if budget.kind == "target_params":
        return parameter_budget(graph, budget.target)
    if budget.kind == "target_macs":
        return macs_budget(model, budget.target, budget.tokens, budget.batch)
    if budget.kind == "target_memory":
        return memory_budget(model, budget.target, budget.tokens, budget.batch)
    return latency_budget(model, graph, budget.target, tokens=budget.tokens, batch=budget.batch, kinds=kinds)

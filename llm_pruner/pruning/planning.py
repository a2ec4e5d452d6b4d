"""Turn settings into a plan: choose layers to remove, score widths, and choose the indices that stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoint.locate import identity
from ..errors import PrunerError
from ..evaluation.cost import macs_budget, memory_budget
from ..evaluation.latency import latency_budget
from ..files import digest
from ..graph.units import CouplingGraph, trace
from ..importance.criteria import needs_calibration as criterion_needs_calibration
from ..importance.layers import BY_POSITION
from ..importance.scores import Scores
from ..logs import log
from ..models.inputs import ModelInputs, hash_of
from ..models.per_layer import has_per_layer_widths
from ..models.skeleton import parameter_count
from ..provenance import versions
from ..selection.budgets import Budget, NothingRemoved, parameter_budget
from ..selection.compose import compose_plans, scores_in_original
from ..selection.plan import PruningPlan, name_after
from ..selection.select import select
from ..surgery.apply import TOWERS, apply
from ..surgery.per_token import EXPERTS_PER_TOKEN
from .context import Planning
from .fewer_experts import routed_to_fewer
from .presets import default_layers
from .quantized import blocks_after, in_blocks, log_blocks
from .settings import (
    BudgetSettings,
    CalibrationSettings,
    EvaluationSettings,
    ModelSettings,
    OutputSettings,
    PruneSettings,
    RefitSettings,
    ScoringSettings,
    WidthSettings,
)
from .towers import LANGUAGE, freeze_others, trace_towers
from .whole_layers import describe_dropped, measure_sensitivity, plan_layers, reachable_shape


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """Result of planning: the plan, the pruned model, the original's graph, the last scores of widths."""

    plan: PruningPlan
    pruned: PreTrainedModel
    graph: CouplingGraph
    scores: Scores | None = None


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


def needs_calibration(settings: PruneSettings) -> bool:
    """Return True if choosing layers or indices, or rescaling norms, needs a calibration set."""
    layers, widths = settings.layers, settings.widths
    by_shape = any("layer" in name for name in settings.shape)
    chooses_layers = bool(layers.keep or by_shape or widths.proportions or "layers" in widths.kinds)
    by_forward = chooses_layers and not layers.drop and layers.criterion not in BY_POSITION
    criterion = settings.scoring.criterion
    protects = "experts" in (*widths.kinds, *widths.proportions) and settings.experts.protects(criterion)
    by_criterion = settings.prunes_widths and (protects or criterion_needs_calibration(criterion))
    return by_forward or by_criterion or settings.refit.rescale_norms


def make_plan(planning: Planning, model: PreTrainedModel) -> PlannedModel:
    """Choose what goes. Whole layers go first; the widths of what is left are scored and chosen then."""
    planned = _make_plan(planning, model)
    if planning.settings.experts.per_token is not None:
        planned.plan.settings[EXPERTS_PER_TOKEN] = planning.settings.experts.per_token
    if (towers := planning.settings.calibration.towers) != LANGUAGE:
        planned.plan.settings[TOWERS] = towers
    return planned


def _make_plan(planning: Planning, model: PreTrainedModel) -> PlannedModel:
    settings, clock = planning.settings, planning.clock
    with clock("trace"):
        graph = _trace(planning, model)
    dropped = plan_layers(planning, model, graph)
    if dropped is None:
        if settings.prunes_widths:
            return _plan_widths(planning, model, graph)
        return PlannedModel(plan=PruningPlan(), pruned=apply(model, PruningPlan(), planning.place), graph=graph)
    with clock("apply"):
        shorter = apply(model, dropped, planning.place)
    size = f"{parameter_count(shorter):,}"
    log.info("%s removed: %s parameters stay", describe_dropped(dropped, graph), size)
    only_layers = PlannedModel(plan=dropped, pruned=shorter, graph=graph)
    budget = settings.budget
    proportional = bool(settings.widths.proportions) and budget is not None and budget.kind == "target_params"
    if proportional and parameter_budget(graph, budget.target).met_by(dropped):  # type: ignore[union-attr]
        return only_layers
    if not settings.prunes_widths:
        return only_layers
    if planning.weights is not None:
        kept = ((new, t) for name, t in planning.weights if (new := name_after(name, dropped)) is not None)
        planning = replace(planning, weights=kept)
    with clock("trace"):
        left = freeze_others(trace(shorter), shorter, settings.calibration.towers)
        left = in_blocks(left, blocks_after(planning.blocks, dropped), settings.widths.kinds)
    try:
        planned = _plan_widths(planning, shorter, left, Whole(model=model, graph=graph, dropped=dropped))
    except NothingRemoved:
        if not settings.shape:
            raise
        return only_layers
    return PlannedModel(plan=compose_plans(dropped, graph, planned.plan, left), pruned=planned.pruned, graph=graph)


def _trace(planning: Planning, model: PreTrainedModel) -> CouplingGraph:
    inputs = planning.ids if isinstance(planning.ids, ModelInputs) else None
    graph = trace_towers(model, planning.settings.calibration.towers, inputs)
    return in_blocks(graph, planning.blocks, planning.settings.widths.kinds)


def without_scores(settings: PruneSettings) -> PruneSettings:
    """Return settings that choose as many indices, at random, and layers by position, without what changes no shape."""
    layers, widths = settings.layers, settings.widths
    criterion = layers.criterion if layers.criterion in BY_POSITION else "spaced_middle"
    proportions = {kind: share or 1.0 for kind, share in widths.proportions.items()}
    return replace(
        settings,
        seed=0,
        model=ModelSettings(name=""),
        scoring=ScoringSettings(criterion="random", taylor="param_first", aggregation="sum", seed=0),
        calibration=CalibrationSettings(dataset="", samples=0, tokens=0, towers=settings.calibration.towers),
        layers=replace(layers, criterion=criterion),
        widths=replace(widths, proportions=proportions, iterative_steps=1),
        experts=replace(settings.experts, protect=False),
        refit=RefitSettings(),
        evaluation=EvaluationSettings(),
        output=OutputSettings(folder=Path()),
    )


def check_plan(planning: Planning, model: PreTrainedModel) -> None:
    """Refuse layers, widths, shapes and targets that a model cannot have; the settings choose at random.

    Raises:
        PrunerError: :func:`make_plan` would raise one whatever the scores.
    """
    settings, whole = planning.settings, None
    model = routed_to_fewer(settings.experts, model)
    graph = _trace(planning, model)
    if settings.widths.uniform:
        _refuse_differing_layers(model, "give the model that it was pruned from")
    dropped = plan_layers(planning, model, graph)
    if not settings.prunes_widths:
        return
    if dropped is not None:
        if settings.widths.proportions and settings.budget is not None:
            return  # widths go on from as many layers as scores leave
        whole = Whole(model=model, graph=graph, dropped=dropped)
        model = apply(model, dropped)
        graph = freeze_others(trace(model), model, settings.calibration.towers)
        graph = in_blocks(graph, blocks_after(planning.blocks, dropped), settings.widths.kinds)
    try:
        goal = _width_goal(planning, model, graph, whole)
    except NothingRemoved:
        if whole is None or not settings.shape:
            raise
        return
    if "hidden" in goal.kinds and goal.config is None:
        _try_hidden(planning, model, graph, replace(goal, budget=None, proportions={}))
    if goal.budget is None:
        return
    goal.budget.limit()
    if goal.budget.name == "target_params" and settings.widths.scope == "local":
        _select(settings.widths, graph, _score(planning, model, graph, goal.kinds, plans=[]), goal, step=1)


def _try_hidden(planning: Planning, model: PreTrainedModel, graph: CouplingGraph, goal: WidthGoal) -> None:
    """Refuse hidden channels that no config expresses, by a random choice of them on the shapes alone.

    Raises:
        PrunerError: as above.
    """
    scores = _score(planning, model, graph, goal.kinds, plans=[])
    plan = _select(planning.settings.widths, graph, scores, goal, step=1)
    try:
        apply(model, plan)
    except PrunerError as error:
        raise PrunerError(f"hidden channels of {type(model).__name__} cannot be pruned: {error}") from error


def _plan_widths(
    planning: Planning, model: PreTrainedModel, graph: CouplingGraph, whole: Whole | None = None
) -> PlannedModel:
    """Choose widths; each iterative step scores the model of the last step and makes a new plan for ``model``.

    Indices that are already removed score lowest.
    """
    settings, clock, steps = planning.settings, planning.clock, planning.settings.widths.iterative_steps
    goal = _width_goal(planning, model, graph, whole)
    log_blocks(graph, goal.kinds)
    plan, pruned, current, scores = PruningPlan(), model, graph, None
    for step in range(1, steps + 1):
        plans = [plan, *([whole.dropped] if whole else [])]
        scores = scores_in_original(_score(planning, pruned, current, goal.kinds, plans=plans), graph, plan)
        try:
            with clock("select"):
                plan = _select(settings.widths, graph, scores, goal, step=step)
        except PrunerError as error:
            if step == steps:
                raise
            log.info("step %d of %d: %s", step, steps, error)
            continue
        with clock("apply"):
            pruned = apply(model, plan, planning.place, goal.config)
        if step < steps:
            log.info("step %d of %d: %s parameters", step, steps, f"{parameter_count(pruned):,}")
            with clock("trace"):
                current = freeze_others(trace(pruned), pruned, settings.calibration.towers)
    if settings.widths.uniform:
        _refuse_differing_layers(pruned, "leave out --uniform")
    plan.settings["iterative_steps"] = steps
    return PlannedModel(plan=plan, pruned=pruned, graph=graph, scores=scores)


def _refuse_differing_layers(model: PreTrainedModel, advice: str) -> None:
    """Refuse a model that no plain config describes, where ``--uniform`` asks for one."""
    if has_per_layer_widths(model.config):
        raise PrunerError(f"--uniform: layers of this {type(model).__name__} have different widths: {advice}")


def _width_goal(planning: Planning, model: PreTrainedModel, graph: CouplingGraph, whole: Whole | None) -> WidthGoal:
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
        scores = _score(planning, model, graph, kinds, plans=plans)
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


def _score(
    planning: Planning,
    model: PreTrainedModel,
    graph: CouplingGraph,
    kinds: tuple[str, ...],
    *,
    plans: list[PruningPlan],
) -> Scores:
    """Score a model that ``plans`` left of the original; they tell its cache from others."""
    return planning.score_widths(model, graph, kinds, _cache_file(planning, kinds, plans))


def _select(widths: WidthSettings, graph: CouplingGraph, scores: Scores, goal: WidthGoal, *, step: int) -> PruningPlan:
    return select(
        graph,
        scores,
        ratio=goal.proportions or widths.ratio * step / widths.iterative_steps,
        kinds=goal.kinds,
        layers=goal.layers,
        scope=widths.scope,
        round_to=widths.round_to,
        budget=goal.budget,
        normalize=widths.normalize,
        floor=widths.floor,
        align=widths.align,
        tensor_parallel=widths.tensor_parallel,
        uniform=widths.uniform,
        counts=goal.counts,
    )


def _cache_file(planning: Planning, kinds: tuple[str, ...], plans: list[PruningPlan]) -> Path | None:
    """Return the file that caches scores, named after a hash of everything that they depend on."""
    settings = planning.settings
    if settings.scoring.cache is None or settings.scoring.criterion == "random":
        return None
    samples = None if planning.ids is None else hash_of(planning.ids)
    key: list[Any] = [versions(), identity(settings.model.name), samples, sorted(kinds)]
    key += [[{name: c.kept.tolist() for name, c in plan.units.items()}, plan.blocks] for plan in plans]
    key += [settings.scoring.criterion, settings.scoring.taylor]
    key += [settings.model.dtype, settings.model.device, settings.model.offload]
    key += [settings.model.task, settings.calibration.towers]
    return settings.scoring.cache / f"{digest(key)}.safetensors"


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

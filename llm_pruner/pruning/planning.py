"""Turn settings into a plan: choose layers to remove, score widths, and choose the indices that stay."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from ..choices import UNGROUPED
from ..errors import PrunerError
from ..graph.units import CouplingGraph, trace
from ..importance.criteria import needs_calibration as criterion_needs_calibration
from ..importance.layers import BY_POSITION
from ..importance.scores import Scores
from ..logs import log
from ..models.inputs import ModelInputs
from ..models.per_layer import has_per_layer_widths
from ..models.skeleton import parameter_count
from ..selection.budgets import NothingRemoved, parameter_budget
from ..selection.compose import compose_plans, scores_in_original
from ..selection.plan import PruningPlan, name_after
from ..surgery.apply import TOWERS, apply
from ..surgery.per_token import EXPERTS_PER_TOKEN
from .combinations import TARGETS
from .context import Planning
from .fewer_experts import routed_to_fewer
from .quantized import blocks_after, in_blocks, log_blocks
from .settings import (
    CalibrationSettings,
    EvaluationSettings,
    ModelSettings,
    OutputSettings,
    PruneSettings,
    RefitSettings,
    ScoringSettings,
)
from .towers import LANGUAGE, freeze_others, trace_towers
from .ungrouped import join_units, split_units
from .whole_layers import describe_dropped, plan_layers
from .widths import Whole, WidthGoal, check_search, score_widths, search_widths, select_widths, width_goal

LARGE_VOCABULARY = 1 / 3  # of the parameters
MANY_NEURONS = 0.7  # of the layers that lose some


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """Result of planning: the plan, the pruned model, the original's graph, the last scores of widths."""

    plan: PruningPlan
    pruned: PreTrainedModel
    graph: CouplingGraph
    scores: Scores | None = None


def needs_calibration(settings: PruneSettings) -> bool:
    """Return True if choosing layers or indices, or rescaling norms, needs a calibration set."""
    layers, widths = settings.layers, settings.widths
    by_shape = any("layer" in name for name in settings.shape)
    chooses_layers = bool(layers.keep or by_shape or widths.proportions or "layers" in widths.kinds)
    chooses_blocks = bool(layers.keep_attention or layers.keep_mlp)
    by_forward = (chooses_blocks or (chooses_layers and not layers.drop)) and layers.criterion not in BY_POSITION
    criterion = settings.scoring.criterion
    protects = "experts" in (*widths.kinds, *widths.proportions) and settings.experts.protects(criterion)
    by_criterion = settings.prunes_widths and (protects or criterion_needs_calibration(criterion))
    return by_forward or by_criterion or settings.refit.rescale_norms or widths.generations is not None


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
    widths = planning.settings.widths
    kinds = (*widths.kinds, *widths.proportions)
    graph = trace_towers(model, planning.settings.calibration.towers, inputs, kinds)
    return in_blocks(graph, planning.blocks, widths.kinds)


def log_plan(planned: PlannedModel, parameters: int) -> None:
    """Log what goes, and what would keep more: without tokens that hold much of the original's ``parameters``, or
    without a few whole layers."""
    for line in planned.plan.summary().splitlines():
        log.info("%s", line)
    for unit in planned.graph.of_kind("vocabulary"):
        if unit.frozen is None and (share := planned.graph.parameters_of(unit) / parameters) >= LARGE_VOCABULARY:
            log.info(
                "%.0f%% of the parameters belong to %s tokens: llm-pruner vocab removes those that your texts do not"
                " use, often at a lower cost",
                100 * share,
                f"{unit.size:,}",
            )
    _suggest_layers(planned)


def _suggest_layers(planned: PlannedModel) -> None:
    """Log flags that remove whole layers first where a target takes most neurons and no layer."""
    stacks, plan = planned.graph.of_kind("layers"), planned.plan
    narrowed = [choice for choice in plan.units.values() if choice.kind == "neurons"]
    if len(stacks) != 1 or plan.layers or not narrowed or not plan.settings.keys() & set(TARGETS):
        return
    lost = 1 - sum(len(choice.kept) for choice in narrowed) / sum(choice.size for choice in narrowed)
    if lost >= MANY_NEURONS:
        log.info(
            "%.0f%% of the neurons of %d layers go: a model often keeps more where a few whole layers go first, as with"
            " --num_layers %d --depth block_influence",
            100 * lost,
            len(narrowed),
            stacks[0].size - max(1, round(stacks[0].size / 8)),
        )


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
        goal = width_goal(planning, model, graph, whole)
    except NothingRemoved:
        if whole is None or not settings.shape:
            raise
        return
    if "hidden" in goal.kinds and goal.config is None:
        _try_hidden(planning, model, graph, replace(goal, budget=None, proportions={}))
    check_search(settings.widths, graph, goal)
    if goal.budget is None:
        return
    goal.budget.limit()
    if goal.budget.name == "target_params" and settings.widths.scope == "local":
        select_widths(settings.widths, graph, score_widths(planning, model, graph, goal.kinds, plans=[]), goal, step=1)


def _try_hidden(planning: Planning, model: PreTrainedModel, graph: CouplingGraph, goal: WidthGoal) -> None:
    """Refuse hidden channels that no config expresses, by a random choice of them on the shapes alone.

    Raises:
        PrunerError: as above.
    """
    scores = score_widths(planning, model, graph, goal.kinds, plans=[])
    plan = select_widths(planning.settings.widths, graph, scores, goal, step=1)
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
    goal = width_goal(planning, model, graph, whole)
    log_blocks(graph, goal.kinds)
    ungrouped = settings.scoring.aggregation == UNGROUPED
    ranked = split_units(graph, goal.kinds) if ungrouped else graph
    plan, pruned, current, scores = PruningPlan(), model, ranked, None
    for step in range(1, steps + 1):
        plans = [plan, *([whole.dropped] if whole else [])]
        scores = scores_in_original(score_widths(planning, pruned, current, goal.kinds, plans=plans), ranked, plan)
        try:
            with clock("select"):
                plan = select_widths(settings.widths, ranked, scores, goal, step=step)
            if settings.widths.generations is not None and planning.ids is not None:  # not for shapes alone
                plan = search_widths(planning, model, graph, scores, goal=goal, start=plan, whole=whole)
        except PrunerError as error:
            if step == steps:
                raise
            log.info("step %d of %d: %s", step, steps, error)
            continue
        if ungrouped:
            plan = join_units(plan)
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

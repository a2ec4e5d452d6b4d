"""From arguments to a plan: what goes whole, what is scored, how much of each unit stays."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..checkpoint import identity
from ..errors import PrunerError
from ..evaluation import latency_budget, macs_budget, memory_budget, parameter_count
from ..files import digest
from ..graph import CouplingGraph, trace
from ..importance import BY_POSITION, NEED_CALIBRATION, Scores, score
from ..logs import log
from ..selection import Budget, NothingRemoved, PruningPlan, composed, lifted, parameter_budget, renamed, select
from ..surgery import Place, apply
from .arguments import PruneArguments
from .shapes import drop, gone, measured, wanted_shape

Weights = Iterable[tuple[str, torch.Tensor]]


class Stopwatch:
    """Seconds of each named stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 3)


def needs_calibration(args: PruneArguments) -> bool:
    """Whether choosing what goes, or mending norms, takes a calibration set."""
    chooses = args.num_layers is not None or bool(args.shape) or args.shares is not None
    by_forward = chooses and not args.drop_layers and args.depth not in BY_POSITION
    by_criterion = args.widths and args.pruner_type in NEED_CALIBRATION
    return by_forward or by_criterion or args.rescale_norms


@dataclass
class Made:
    """What planning gives: the plan for the model, the pruned model, the model's graph, the last scores of widths."""

    plan: PruningPlan
    pruned: PreTrainedModel
    graph: CouplingGraph
    scores: Scores | None


def make_plan(
    args: PruneArguments,
    model: PreTrainedModel,
    ids: torch.Tensor | None,
    clock: Stopwatch,
    place: Place,
    weights: Weights | None = None,
) -> Made:
    """Choose what goes, by the calibration set ``ids``; new tensors are put in their ``place``.

    Whole layers go first, and the widths of what that leaves are scored and chosen then; the plan says both.
    """
    with clock("trace"):
        graph = trace(model)
    dropped = drop(args, model, graph, ids, clock)
    if dropped is None:
        return _narrowed(args, model, graph, ids, clock, place, weights)
    with clock("apply"):
        shorter = apply(model, dropped, place)
    log.info("without %s: %s parameters", gone(dropped), f"{parameter_count(shorter):,}")
    done = args.shares and args.target_params and parameter_budget(graph, args.target_params).met_by(dropped)
    if done or not args.widths:
        return Made(dropped, shorter, graph, None)
    if weights is not None:
        weights = ((new, t) for name, t in weights if (new := renamed(name, dropped)) is not None)
    with clock("trace"):
        left = trace(shorter)
    try:
        made = _narrowed(args, shorter, left, ids, clock, place, weights, (model, graph, dropped))
    except NothingRemoved:
        if not args.shape:
            raise
        return Made(dropped, shorter, graph, None)
    return Made(composed(dropped, graph, made.plan, left), made.pruned, graph, None)


def _narrowed(
    args: PruneArguments,
    model: PreTrainedModel,
    graph: CouplingGraph,
    ids: torch.Tensor | None,
    clock: Stopwatch,
    place: Place,
    weights: Weights | None,
    whole: tuple[PreTrainedModel, CouplingGraph, PruningPlan] | None = None,
) -> Made:
    """Choose widths; ``whole`` is the model, with its graph, that layers were dropped from by a plan.

    With several iterative steps, each step scores the last step's model and plans anew for the original, in
    which what is gone already scores lowest.
    """
    config = counts = shares = None
    if args.shape:
        config, counts = wanted_shape(model, graph, args.shape)
        kinds = tuple({u.kind: None for u in graph.units if counts.get(u.name, u.size) < u.size})
        if not kinds and config.to_dict() == model.config.to_dict():
            raise NothingRemoved("the model has this shape already")
        if not kinds:
            raise PrunerError("the shape cannot be reached: its weights are as large as the model's, not the same")
    else:
        kinds = args.kinds(graph)
    with clock("budget"):
        budget = None if args.shape else _budget(args, model, graph, kinds, whole)
    if (proportions := args.proportions()) is not None:
        shares = {kind: share for kind, share in proportions.items() if kind != "layers"}
        kinds = tuple(shares)
    layers = None if counts or shares else args.layers(graph)
    scope = "global" if args.global_pruning else "local"

    def scored(model: PreTrainedModel, graph: CouplingGraph, plan: PruningPlan) -> Scores:
        criteria = str(args.pruner_type), str(args.taylor), str(args.grouping_strategy)
        cache = _cache(args, ids, kinds, [plan, *(whole[2:] if whole else ())])
        with clock("score"):
            return score(model, graph, ids, *criteria, kinds, args.seed, args.device, weights, cache=cache)

    def chosen(scores: Scores, ratio: float | dict[str, float]) -> PruningPlan:
        aligned = bool(args.hardware_align)
        with clock("select"):
            return select(
                graph,
                scores,
                ratio,
                kinds,
                layers,
                scope,
                args.round_to,
                None,
                budget,
                args.normalize,
                args.floor,
                aligned,
                args.tensor_parallel,
                counts,
            )

    if shares is not None and not all(shares.values()):
        with clock("sensitivity"):
            shares = measured(model, graph, scored(model, graph, PruningPlan()), tuple(shares), ids)
    plan, pruned, current, scores = PruningPlan(), model, graph, None
    for step in range(1, args.iterative_steps + 1):
        scores = lifted(scored(pruned, current, plan), graph, plan)
        try:
            plan = chosen(scores, shares or args.pruning_ratio * step / args.iterative_steps)
        except PrunerError as error:
            if step == args.iterative_steps:
                raise
            log.info("step %d of %d: %s", step, args.iterative_steps, error)
            continue
        with clock("apply"):
            pruned = apply(model, plan, place, config)
        if step < args.iterative_steps:
            log.info("step %d of %d: %s parameters", step, args.iterative_steps, f"{parameter_count(pruned):,}")
            with clock("trace"):
                current = trace(pruned)
    plan.settings["iterative_steps"] = args.iterative_steps
    return Made(plan, pruned, graph, scores)


def _cache(
    args: PruneArguments, ids: torch.Tensor | None, kinds: tuple[str, ...], plans: list[PruningPlan]
) -> Path | None:
    """The file for what scoring finds: named after all that it depends on, of the model its files' sizes and times."""
    if not args.score_cache or args.pruner_type == "random":
        return None
    samples = None if ids is None else hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    gone = [{name: choice.kept.tolist() for name, choice in plan.units.items()} for plan in plans]
    blocks = [plan.blocks for plan in plans]
    how = [args.pruner_type, args.taylor, sorted(kinds), args.dtype, args.device, args.stream]
    return Path(args.score_cache) / f"{digest([identity(args.base_model), samples, gone, blocks, how])}.safetensors"


def _budget(
    args: PruneArguments,
    model: PreTrainedModel,
    graph: CouplingGraph,
    kinds: tuple[str, ...],
    whole: tuple[PreTrainedModel, CouplingGraph, PruningPlan] | None = None,
) -> Budget | None:
    """What the model may cost; a share is one of what the ``whole`` costs, before layers went."""

    def budget(model: PreTrainedModel, graph: CouplingGraph) -> Budget | None:
        if args.target_params is not None:
            return parameter_budget(graph, args.target_params)
        if args.target_macs is not None:
            return macs_budget(model, args.target_macs, args.budget_tokens, args.budget_batch)
        if args.target_memory is not None:
            return memory_budget(model, args.target_memory, args.budget_tokens, args.budget_batch)
        if args.target_latency is not None:
            if args.stream:
                raise PrunerError(
                    "--target_latency times a model in memory, and this one has to be streamed: give --target_macs"
                )
            return latency_budget(model, graph, args.target_latency, args.budget_tokens, args.budget_batch, kinds)
        return None

    found = budget(model, graph)
    if found is not None and whole is not None:
        cost = budget(*whole[:2])
        found.whole = cost.measure(PruningPlan()) if cost else None
    return found

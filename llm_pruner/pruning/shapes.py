"""What flags ask for beside a ratio: whole layers, blocks of layers, a shape, proportions between kinds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import PrunerError
from ..evaluation import parameter_count
from ..graph import CouplingGraph, block_of, computing, evaluating, total_loss
from ..importance import BY_POSITION, Scores, score
from ..logs import log
from ..selection import NothingRemoved, NotMet, PruningPlan, parameter_budget, parameters, select
from ..surgery import apply, fitting, layer_counts, nearest, shapes_for, target_config

if TYPE_CHECKING:
    from .arguments import PruneArguments

PROBE = 0.05  # of the parameters: what each kind loses to see what that costs
BATCH = 16  # samples in a forward pass


class Clock(Protocol):
    def __call__(self, stage: str) -> Any: ...


def drop(
    args: PruneArguments, model: PreTrainedModel, graph: CouplingGraph, ids: torch.Tensor | None, clock: Clock
) -> PruningPlan | None:
    """The plan for whole layers and blocks of them, None where none go.

    Raises:
        PrunerError: there are no such layers, or too few.
    """
    blocks = [
        block_of(model, graph, _stack(graph, where, flag), layer, kind)
        for flag, kind in (("drop_attention", "heads"), ("drop_mlp", "neurons"))
        for where, layer in args.numbers(flag)
    ]
    counts, scores = _layers(args, model, graph, ids, clock)
    plan = None
    if counts:
        plan = select(graph, scores, counts=counts)
    for path in blocks:
        plan = plan or PruningPlan()
        plan.drop_block(path, graph.shapes)
    return plan


def _layers(
    args: PruneArguments, model: PreTrainedModel, graph: CouplingGraph, ids: torch.Tensor | None, clock: Clock
) -> tuple[dict[str, int], Scores]:
    """How many layers of each stack stay, of those that lose some, and what each is worth."""
    units = {unit.name: unit for unit in graph.of_kind("layers")}
    strategy = str(args.depth)
    if args.drop_layers:
        values = {name: torch.full((unit.size,), torch.inf, dtype=torch.float64) for name, unit in units.items()}
        for where, layer in args.numbers("drop_layers"):
            name = _stack(graph, where, "drop_layers") + ".layers"
            if layer >= units[name].size:
                raise PrunerError(f"--drop_layers {layer} is out of range: {name} are 0 to {units[name].size - 1}")
            values[name][layer] = 0.0
        counts = {name: int(value.isinf().sum()) for name, value in values.items()}
        return _fewer(units, counts), Scores(values, {"criterion": "named"})
    if args.layer_wise:
        if len(units) != 1:
            raise PrunerError(f"--layer_wise is for one stack of layers, the model has {len(units)}: use --num_layers")
        counts = dict.fromkeys(units, args.layer or 0)
    elif args.num_layers is not None:
        asked = args.numbers("num_layers")
        if len(asked) > len(units):
            raise PrunerError(f"--num_layers names {len(asked)} stacks of layers, the model has {len(units)}")
        counts = {}
        for i, (where, count) in enumerate(asked):
            counts[_stack(graph, where, "num_layers") + ".layers" if where else list(units)[i]] = count
    elif args.shape:
        config = target_config(model, args.shape)
        with _or_nearest(model, args.shape):
            counts = layer_counts(graph, shapes_for(type(model), config))
    elif (shares := args.proportions()) and "layers" in shares:
        return _shared(args, model, graph, ids, shares, clock)
    else:
        return {}, Scores({})
    for name, count in counts.items():
        if not 1 <= count <= units[name].size:
            raise PrunerError(f"{name}: cannot keep {count} of {units[name].size}: give 1 to {units[name].size - 1}")
    counts = _fewer(units, counts)
    if not counts:
        if args.shape:
            return {}, Scores({})
        raise PrunerError("as many layers are to stay as the model has: give fewer")
    with clock("depth"):
        return counts, _scored(args, model, graph, ids, strategy, max(units[n].size - c for n, c in counts.items()))


def _fewer(units: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count < units[name].size}


def _scored(
    args: PruneArguments,
    model: PreTrainedModel,
    graph: CouplingGraph,
    ids: torch.Tensor | None,
    strategy: str,
    most: int | None,
) -> Scores:
    seen = None if ids is None or strategy in BY_POSITION else ids[: args.depth_examples]
    return score(model, graph, seen, strategy, kinds=["layers"], device=args.device, most=most)


def _stack(graph: CouplingGraph, where: str, flag: str) -> str:
    """The path of the stack of layers that is meant: the only one, or the one whose path has ``where`` in it."""
    paths = [unit.name.removesuffix(".layers") for unit in graph.of_kind("layers")]
    found = [path for path in paths if where in path.split(".")] if where else paths
    if len(found) != 1:
        names = ", ".join(paths) or "none"
        raise PrunerError(f"--{flag}: which stack of layers is meant? The model has {names}: give encoder.N, say")
    return found[0]


def gone(plan: PruningPlan) -> str:
    """What a plan drops whole, for the log."""
    parts = []
    for path, kept in plan.layers.items():
        size = plan.units[f"{path}.layers"].size
        left = set(kept.tolist())
        parts.append(f"{path} {', '.join(str(i) for i in range(size) if i not in left)}")
    return "; ".join([*parts, *plan.blocks])


def wanted_shape(
    model: PreTrainedModel, graph: CouplingGraph, shape: Mapping[str, Any]
) -> tuple[PreTrainedConfig, dict[str, int]]:
    """The config of a shape, and what each unit keeps for it; the layers are as many already.

    Raises:
        PrunerError: the shape cannot be reached; the message names the nearest that can.
    """
    config = target_config(model, shape)
    with _or_nearest(model, shape):
        return config, fitting(graph, type(model), config)


@contextmanager
def _or_nearest(model: PreTrainedModel, shape: Mapping[str, Any]) -> Iterator[None]:
    """Where a shape cannot be reached, name those near it that can."""
    try:
        yield
    except PrunerError as error:
        near = [f"{name} {value}" for name, value in nearest(model, shape)]
        hint = f"; with all else as asked, these can: {', '.join(near)}" if near else ""
        raise PrunerError(f"the shape cannot be reached: {error}{hint}") from error


def _shared(
    args: PruneArguments,
    model: PreTrainedModel,
    graph: CouplingGraph,
    ids: torch.Tensor | None,
    shares: dict[str, float],
    clock: Clock,
) -> tuple[dict[str, int], Scores]:
    """How many layers go when layers and widths go in proportions."""
    if args.target_params is None:
        raise PrunerError("--shares with layers goes with --target_params")
    kinds = tuple(kind for kind in shares if kind != "layers")
    with clock("depth"):
        scores = _scored(args, model, graph, ids, str(args.depth), None)
    with clock("score"):
        criteria = str(args.pruner_type), str(args.taylor), str(args.grouping_strategy)
        widths = score(model, graph, ids, *criteria, kinds, args.seed, args.device) if kinds else Scores({})
    both = Scores(scores.values | widths.values, widths.settings)
    if not all(shares.values()):
        with clock("sensitivity"):
            shares = measured(model, graph, both, tuple(shares), ids)
    budget = parameter_budget(graph, args.target_params)
    try:
        plan = select(graph, both, shares, budget=budget, floor=args.floor)
    except NotMet as error:  # layers are large steps; widths do what one of them would be too much for
        plan = error.above or PruningPlan()
    counts = {f"{path}.layers": len(kept) for path, kept in plan.layers.items()}
    return counts, scores


def measured(
    model: PreTrainedModel, graph: CouplingGraph, scores: Scores, kinds: tuple[str, ...], ids: torch.Tensor | None
) -> dict[str, float]:
    """Proportions in which kinds of units go, by what going costs: the loss is measured with a little of each gone.

    The cost of removing x parameters of one kind is taken for a x^2; the least sum of these for a given sum of x has x
    in proportion to 1 / a.

    Raises:
        PrunerError: there is no calibration set.
    """
    if ids is None:
        raise PrunerError("measured proportions need a calibration set: give --pruner_type taylor, say")
    whole, total = _loss(model, ids), parameter_count(model)
    out = {}
    for kind in kinds:
        everything = select(graph, scores, 1 - 1e-6, [kind])
        freed = total - parameters(graph, everything)
        plan, ratio = None, PROBE * total / freed
        while plan is None:
            try:
                plan = select(graph, scores, min(ratio, 0.5), [kind])
            except NothingRemoved:
                if ratio >= 0.5:
                    raise
                ratio *= 1.5
        taken = total - parameters(graph, plan)
        cost = max(_loss(apply(model, plan), ids) - whole, 1e-4)
        out[kind] = taken**2 / cost / freed
        log.info("%s: without %.1f%% of the parameters the loss is %+.4f", kind, 100 * taken / total, cost)
    largest = max(out.values())
    return {kind: value / largest for kind, value in out.items()}


def _loss(model: PreTrainedModel, ids: torch.Tensor) -> float:
    with evaluating(model), computing(model) as compute:
        total, tokens = total_loss(model, ids.to(compute.device).split(BATCH))
    return total / tokens

"""Plans for whole layers and blocks, reachable shapes, and the sensitivity of the loss to each kind of unit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import PrunerError
from ..graph.blocks import block_of, block_outputs
from ..graph.tracer import TraceError
from ..graph.units import CouplingGraph, Unit
from ..importance.layers import BY_LOSS, BY_POSITION
from ..importance.score import score, score_blocks
from ..importance.scores import Scores
from ..logs import log
from ..models.blockwise import computing
from ..models.inputs import Inputs
from ..models.loss import has_loss, total_loss
from ..models.running import evaluating
from ..models.skeleton import parameter_count
from ..progress import track
from ..selection.budgets import NothingRemoved, NotMet, parameter_budget, parameters
from ..selection.plan import PruningPlan
from ..selection.ranking import removable_count
from ..selection.select import select
from ..surgery.apply import apply
from ..surgery.config.shape import counts_fitting, layer_counts, nearest, shapes_for, target_config
from .context import Planning
from .settings import LayerSettings, PruneSettings

PROBE = 0.05  # share of the parameters that each kind loses to measure what that costs
SAMPLES_PER_PASS = 16
BLOCKS = {"attention": "heads", "mlp": "neurons"}  # blocks of a layer, by the units that they hold
TITLES = {"attention": "attention", "mlp": "an MLP"}
WITHOUT_LOSS = "cosine"  # chooses layers of models that predict no tokens


def plan_layers(planning: Planning, model: PreTrainedModel, graph: CouplingGraph) -> PruningPlan | None:
    """Return the plan for whole layers and blocks; None if none are removed.

    Raises:
        PrunerError: a layer does not exist, or too few would stay.
    """
    settings, layers = planning.settings, planning.settings.layers
    if layers.drop:
        counts, scores = _named_layers(graph, layers.drop)
    elif "layers" in settings.widths.proportions:
        counts, scores = _proportional_layers(planning, model, graph)
    else:
        counts, scores = _counted_layers(planning, model, graph)
    plan = select(graph, scores, counts=counts) if counts else PruningPlan()
    for block in BLOCKS:
        named = [
            _block_path(model, graph, plan, block, layer, where=where)
            for where, layer in getattr(layers, f"drop_{block}")
        ]
        for path in [*named, *_counted_blocks(planning, model, graph, plan, block)]:
            plan.drop_block(path, graph.shapes)
    return plan if plan.units or plan.blocks else None


def _counted_blocks(
    planning: Planning, model: PreTrainedModel, graph: CouplingGraph, plan: PruningPlan, block: str
) -> list[str]:
    """Return the paths of the attention or MLP blocks that go by number, of the layers that a plan leaves.

    Raises:
        PrunerError: a number is not one that can stay.
    """
    flag, keep = f"num_{block}", getattr(planning.settings.layers, f"keep_{block}")
    if not keep:
        return []
    blocks, most = dict[str, list[str | None]](), dict[str, int]()
    for name, count in _counts_by_stack(keep, flag, graph).items():
        paths = _blocks_of(model, graph, graph.unit(name), plan, kind=BLOCKS[block])
        present, fewest = len(paths), sum(path is None for path in paths.values())
        if not fewest <= count < present:
            title = f"{present} layers of {_stack_title(graph, name)} have {TITLES[block]}"
            hint = f"give {fewest} to {present - 1}" if fewest < present else "none of it can go"
            raise PrunerError(f"--{flag}: cannot keep {count}, {title}: {hint}")
        if some := next(filter(None, paths.values()), None):
            block_outputs(model, some)
        blocks[name] = [paths.get(i) for i in range(graph.unit(name).size)]
        most[name] = present - count
    scores = _score_blocks(planning, model, graph, blocks, most)
    lowest = {name: values.argsort(stable=True)[: most[name]].tolist() for name, values in scores.items()}
    return [path for name, layers in lowest.items() for i in sorted(layers) if (path := blocks[name][i])]


def _blocks_of(
    model: PreTrainedModel, graph: CouplingGraph, unit: Unit, plan: PruningPlan, *, kind: str
) -> dict[int, str | None]:
    """Return the block with units of a kind of each layer that stays and has one: its path, None if it cannot go."""
    stack = unit.name.removesuffix(".layers")
    stays = _layers_left(plan, stack, unit.size)
    names = [name for u in [*graph.units, *graph.frozen] if u.kind == kind for name in u.parameters]
    paths: dict[int, str | None] = {}
    for layer in stays:
        if any(name.startswith(f"{stack}.{layer}.") for name in names):
            try:
                paths[layer] = block_of(model, graph, stack, layer, kind=kind, first=stays[0])
            except TraceError:
                paths[layer] = None
    return paths


def _layers_left(plan: PruningPlan, stack: str, size: int) -> list[int]:
    return plan.layers[stack].tolist() if stack in plan.layers else list(range(size))


def _block_path(
    model: PreTrainedModel, graph: CouplingGraph, plan: PruningPlan, block: str, layer: int, *, where: str
) -> str:
    """Return the path of the block of a layer that ``--drop_attention`` or ``--drop_mlp`` names."""
    flag = f"drop_{block}"
    stack = _stack_path(graph, where, flag)
    first = _layers_left(plan, stack, 1)[0]
    try:
        path = block_of(model, graph, stack, layer, kind=BLOCKS[block], first=first)
        block_outputs(model, path)
    except TraceError as error:
        raise PrunerError(f"--{flag} {layer}: {error}") from error
    return path


def _named_layers(graph: CouplingGraph, drop: tuple[tuple[str, int], ...]) -> tuple[dict[str, int], Scores]:
    """Return how many layers stay in each stack without the named ones, and scores that rank these lowest."""
    units = {unit.name: unit for unit in graph.of_kind("layers")}
    values = {name: torch.full((unit.size,), torch.inf, dtype=torch.float64) for name, unit in units.items()}
    for where, layer in drop:
        name = _stack_path(graph, where, "drop_layers") + ".layers"
        if layer >= units[name].size:
            has = f"{_stack_title(graph, name)} has layers 0 to {units[name].size - 1}"
            raise PrunerError(f"--drop_layers {layer} is out of range: {has}")
        values[name][layer] = 0.0
        if not values[name].any():
            raise PrunerError(f"--drop_layers names all layers of {_stack_title(graph, name)}: leave one out")
    counts = {name: int(value.isinf().sum()) for name, value in values.items()}
    return _only_fewer(units, counts), Scores(values, {"criterion": "named"})


def _counted_layers(planning: Planning, model: PreTrainedModel, graph: CouplingGraph) -> tuple[dict[str, int], Scores]:
    """Return how many layers stay in each stack by the settings, and the scores of layers in stacks that lose some."""
    settings, units = planning.settings, {unit.name: unit for unit in graph.of_kind("layers")}
    counts = _layer_counts(settings, model, graph, units)
    for name, count in counts.items():
        if not 1 <= count <= units[name].size:
            flag = "--layer: " if settings.layers.first else "--num_layers: " if settings.layers.keep else ""
            has = f"{_stack_title(graph, name)} has {units[name].size} layers"
            raise PrunerError(f"{flag}cannot keep {count} layers, {has}: give 1 to {units[name].size - 1}")
    fewer = _only_fewer(units, counts)
    if counts and not fewer and not settings.shape:
        raise PrunerError("no layer would be removed, since all that the model has would stay: give fewer layers")
    if not fewer:
        return {}, Scores({})
    most = max(units[name].size - count for name, count in fewer.items())
    return fewer, _score_layers(planning, model, graph, most)


def _layer_counts(
    settings: PruneSettings, model: PreTrainedModel, graph: CouplingGraph, units: Mapping[str, Unit]
) -> dict[str, int]:
    layers = settings.layers
    if layers.first:
        if len(units) != 1:
            raise PrunerError(f"--layer_wise is for one stack of layers, the model has {len(units)}: use --num_layers")
        return dict.fromkeys(units, layers.first)
    if layers.keep:
        return _counts_by_stack(layers.keep, "num_layers", graph)
    if settings.shape:
        config = target_config(model, settings.shape)
        with _naming_nearest(model, settings.shape):
            return layer_counts(graph, shapes_for(type(model), config))
    if "layers" in settings.widths.kinds:
        return {name: unit.size - removable_count(unit, settings.widths.ratio) for name, unit in units.items()}
    return {}


def _counts_by_stack(keep: Sequence[tuple[str, int]], flag: str, graph: CouplingGraph) -> dict[str, int]:
    """Return the numbers of a flag by unit: those without a name are of the first stacks."""
    units = [unit.name for unit in graph.of_kind("layers")]
    if len(keep) > len(units):
        raise PrunerError(f"--{flag} names {len(keep)} stacks of layers, the model has {len(units)}")
    return {
        _stack_path(graph, where, flag) + ".layers" if where else units[i]: count
        for i, (where, count) in enumerate(keep)
    }


def _only_fewer(units: Mapping[str, Unit], counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count < units[name].size}


def _score_layers(planning: Planning, model: PreTrainedModel, graph: CouplingGraph, most: int | None = None) -> Scores:
    criterion, samples = _criterion_and_samples(planning, model)
    device = planning.settings.model.device
    with planning.clock("depth"):
        return score(model, graph, samples, criterion, kinds=["layers"], device=device, most=most)


def _score_blocks(
    planning: Planning,
    model: PreTrainedModel,
    graph: CouplingGraph,
    blocks: Mapping[str, Sequence[str | None]],
    most: Mapping[str, int],
) -> dict[str, torch.Tensor]:
    criterion, samples = _criterion_and_samples(planning, model)
    device = planning.settings.model.device
    with planning.clock("depth"):
        return score_blocks(model, graph, samples, criterion, blocks=blocks, most=most, device=device)


def _criterion_and_samples(planning: Planning, model: PreTrainedModel) -> tuple[str, Inputs | None]:
    layers, ids = planning.settings.layers, planning.ids
    criterion = _layer_criterion(layers, model)
    return criterion, None if ids is None or criterion in BY_POSITION else ids[: layers.samples]


def _layer_criterion(layers: LayerSettings, model: PreTrainedModel) -> str:
    """Return the criterion that chooses layers: another one where the default compares losses and there are none."""
    if layers.replaceable and layers.criterion in BY_LOSS and not has_loss(model):
        log.info("layers are chosen by --depth %s: %s has no loss on a text", WITHOUT_LOSS, type(model).__name__)
        return WITHOUT_LOSS
    return layers.criterion


def _stack_path(graph: CouplingGraph, where: str, flag: str) -> str:
    """Return the path of a stack of layers: the only one, or the one whose path has ``where`` in it."""
    paths = [unit.name.removesuffix(".layers") for unit in graph.of_kind("layers")]
    matching = [path for path in paths if where in path.split(".")] if where else paths
    if len(matching) != 1:
        raise PrunerError(
            f"--{flag} does not say which stack of layers is meant: the model has {', '.join(paths) or 'none'}; give "
            "encoder.N, say"
        )
    return matching[0]


def _stack_title(graph: CouplingGraph, unit_name: str) -> str:
    """Return the name of a stack of layers for messages: its path where the model has several."""
    return unit_name.removesuffix(".layers") if len(graph.of_kind("layers")) > 1 else "the model"


def describe_dropped(plan: PruningPlan, graph: CouplingGraph) -> str:
    """Return the layers and blocks that a plan drops, for the log; stacks are named where there are several."""
    parts, several = [], len(graph.of_kind("layers")) > 1
    for path, kept in plan.layers.items():
        stays = set(kept.tolist())
        removed = [str(i) for i in range(plan.units[f"{path}.layers"].size) if i not in stays]
        parts.append(f"{path if several else 'layers'} {', '.join(removed)}")
    return "; ".join([*parts, *plan.blocks])


def reachable_shape(
    model: PreTrainedModel, graph: CouplingGraph, shape: Mapping[str, Any]
) -> tuple[PreTrainedConfig, dict[str, int]]:
    """Return the config of a shape and how many indices each unit keeps for it; layers are as many already.

    Raises:
        PrunerError: the shape cannot be reached; the message names the nearest that can.
    """
    config = target_config(model, shape)
    with _naming_nearest(model, shape):
        return config, counts_fitting(graph, type(model), config)


@contextmanager
def _naming_nearest(model: PreTrainedModel, shape: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except PrunerError as error:
        near = [f"{name} {value}" for name, value in nearest(model, shape)]
        hint = f"; with all else as asked, these can: {', '.join(near)}" if near else ""
        raise PrunerError(f"the shape cannot be reached: {error}{hint}") from error


def _proportional_layers(
    planning: Planning, model: PreTrainedModel, graph: CouplingGraph
) -> tuple[dict[str, int], Scores]:
    """Return how many layers stay when layers and widths are removed in proportions, and the scores of layers."""
    settings, budget_settings = planning.settings, planning.settings.budget
    if budget_settings is None or budget_settings.kind != "target_params":
        target = f", not --{budget_settings.kind}" if budget_settings else ""
        raise PrunerError(f"layers go in proportion to other kinds under --target_params{target}: give that")
    shares = dict(settings.widths.proportions)
    kinds = tuple(kind for kind in shares if kind != "layers")
    layer_scores = _score_layers(planning, model, graph)
    width_scores = planning.score_widths(model, graph, kinds) if kinds else Scores({})
    both = Scores(layer_scores.values | width_scores.values, width_scores.settings)
    if not all(shares.values()):
        with planning.clock("sensitivity"):
            shares = measure_sensitivity(model, graph, both, kinds=tuple(shares), ids=planning.ids)
    budget = parameter_budget(graph, budget_settings.target)
    try:
        plan = select(graph, both, ratio=shares, budget=budget, floor=settings.widths.floor)
    except NotMet as error:  # layers are large steps; widths do what one more layer would overdo
        if not kinds:
            raise
        plan = error.above
    return {f"{path}.layers": len(kept) for path, kept in plan.layers.items()}, layer_scores


def measure_sensitivity(
    model: PreTrainedModel,
    graph: CouplingGraph,
    scores: Scores,
    *,
    kinds: tuple[str, ...],
    ids: Inputs | None,
) -> dict[str, float]:
    """Measure in which proportions to remove kinds of units, by how much the loss grows without a little of each.

    The cost of removing x parameters of one kind is modelled as a x^2; for a given sum of x, the sum of costs is least
    with x in proportion to 1 / a.

    Raises:
        PrunerError: there is no calibration set.
    """
    if ids is None:
        raise PrunerError("--shares measured needs a calibration set: give a criterion that reads one, such as taylor")
    loss, total = _loss(model, ids), parameter_count(model)
    proportions = {}
    for kind in track(kinds, "measuring what each kind of unit costs"):
        freed = total - parameters(graph, select(graph, scores, ratio=1 - 1e-6, kinds=[kind]))
        plan = _probe(graph, scores, kind, PROBE * total / freed)
        removed = total - parameters(graph, plan)
        cost = max(_loss(apply(model, plan), ids) - loss, 1e-4)
        proportions[kind] = removed**2 / cost / freed
        log.info("%s: without %.1f%% of the parameters the loss is %+.4f", kind, 100 * removed / total, cost)
    largest = max(proportions.values())
    return {kind: value / largest for kind, value in proportions.items()}


def _probe(graph: CouplingGraph, scores: Scores, kind: str, ratio: float) -> PruningPlan:
    """Return the plan of the least ratio from ``ratio`` up that removes an index of a kind."""
    while True:
        try:
            return select(graph, scores, ratio=min(ratio, 0.5), kinds=[kind])
        except NothingRemoved:
            if ratio >= 0.5:
                raise
            ratio *= 1.5


def _loss(model: PreTrainedModel, ids: Inputs) -> float:
    with evaluating(model), computing(model) as compute:
        total, tokens = total_loss(model, ids.to(compute.device).split(SAMPLES_PER_PASS))
    return total / tokens

"""Predict the shapes and sizes that the stages of a recipe or the points of a sweep leave, without reading a weight."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from rich.table import Table as TerminalTable
from transformers import PreTrainedModel

from ..checkpoint.config import load_config, meta_model
from ..errors import PrunerError
from ..evaluation.cost import macs
from ..evaluation.tabular import terminal_tables
from ..graph.tracer import TraceError
from ..graph.units import CouplingGraph, trace
from ..models.per_layer import layer_lists
from ..models.skeleton import parameter_count, skeleton
from ..models.tasks import ask_for, class_for
from ..pruning.arguments import PruneArguments
from ..pruning.context import Planning
from ..pruning.fewer_experts import routed_to_fewer
from ..pruning.planning import make_plan, without_scores
from ..pruning.settings import PruneSettings, resolve_settings
from ..pruning.towers import LANGUAGE
from ..selection.budgets import UNITS, NotMet, read_target
from ..selection.plan import PruningPlan
from ..surgery.apply import apply, task_of_plan
from ..surgery.uniform import uniform_config
from ..vocabulary.arguments import VocabArguments
from ..vocabulary.choosing import token_budget
from .recipe import Recipe
from .steps import Step
from .sweep import CALIBRATION_SEED, SEED, SweepPoint, check_point

MACS_TOKENS = 128
SHAPES = ["layers", "hidden", "heads", "neurons", "vocabulary"]
SIZES = [*SHAPES, "parameters", "ratio", f"MACs ({MACS_TOKENS} tokens)", "ratio"]
KINDS = SHAPES[1:]
UNKNOWN, ESTIMATED = "?", "~"
NO_SIZES = [""] * len(SIZES)


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """Model that a stage leaves, on the meta device; None if it cannot be predicted.

    Attributes:
        estimated: the sizes depend on scores, measurements or counts that a dry run does not make.
    """

    model: PreTrainedModel | None
    estimated: bool = False

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """Parameters and multiply-accumulates."""
        assert self.model is not None
        return parameter_count(self.model), macs(self.model, MACS_TOKENS)

    @cached_property
    def shape_cells(self) -> list[str]:
        """Cells of layers and widths."""
        assert self.model is not None
        units = trace(self.model)
        by_kind = [_sizes(units, kind) for kind in KINDS]
        widths = ["-".join(map(str, dict.fromkeys((sizes[0], sizes[-1])))) if sizes else "" for sizes in by_kind]
        return ["+".join(str(len(stack)) for stack in layer_lists(self.model).values()), *widths]

    def cells(self, original: Prediction) -> list[str]:
        """Return the cells of :data:`SIZES`, with shares of the original."""
        if self.model is None:
            return [UNKNOWN] * len(SIZES)
        mark = ESTIMATED if self.estimated else ""
        shares = zip(self.sizes, original.sizes, strict=True)
        costs = [cell for n, whole in shares for cell in (f"{n:,}", f"{n / whole:.3f}")]
        return [*self.shape_cells, *(f"{mark}{cell}" for cell in costs)]


def _sizes(graph: CouplingGraph, kind: str) -> list[int]:
    """Return the sizes of a kind's units, frozen ones included, but without frozen parts of the hidden size.

    Such parts are, for example, the halves that rotary position embeddings combine.
    """
    prunable = graph.of_kind(kind)
    frozen = [] if kind == "hidden" and prunable else [unit for unit in graph.frozen if unit.kind == kind]
    return sorted({unit.size for unit in [*prunable, *frozen]})


@dataclass(frozen=True, kw_only=True)
class Change:
    """Arguments of a stage that decide the shapes of its result: equal changes of a model give equal shapes.

    Attributes:
        decisive: settings of ``prune``, ``--keep`` of ``vocab``, the plan of ``apply``; None for ``to-uniform``.
        task: task whose class the stage loads, None for the declared class.
        trust_remote_code: as the flag of the stage.
    """

    command: str
    decisive: PruneSettings | str | None = None
    task: str | None = None
    trust_remote_code: bool = False


class Predictor:
    """Predict the models that stages leave; build each original once, and predict equal changes once."""

    def __init__(self) -> None:
        self._originals: dict[tuple[str, bool], Prediction] = {}
        self._after: dict[tuple[Prediction, str], Prediction | PrunerError] = {}

    def stages(self, recipe: Recipe, steps: Sequence[Step]) -> list[Prediction | None]:
        """Predict the original and the model that every stage leaves, None for a stage that changes no shape.

        Raises:
            PrunerError: the model cannot be read, or a stage cannot do what is asked; with file and line.
        """
        trust = any(getattr(step.arguments(), "trust_remote_code", False) for step in steps)
        current = self._original(recipe.model, trust)
        predictions: list[Prediction | None] = [current]
        for i, step in enumerate(steps):
            change = _change(step)
            try:
                predictions.append(None if change is None else self._predict(current, change))
            except PrunerError as error:
                raise recipe.source.fault(("stages", i), str(error)) from error
            current = predictions[-1] or current
        return predictions

    def _original(self, name: str, trust: bool) -> Prediction:
        if (name, trust) not in self._originals:
            self._originals[name, trust] = Prediction(model=meta_model(load_config(name, trust), trust))
        return self._originals[name, trust]

    def _predict(self, before: Prediction, change: Change) -> Prediction:
        key = before, repr(change)
        if key not in self._after:
            try:
                self._after[key] = _predict(before, change)
            except PrunerError as error:
                self._after[key] = error
        after = self._after[key]
        if isinstance(after, PrunerError):
            raise after
        return after


def predict_stages(recipe: Recipe, steps: Sequence[Step]) -> list[list[str]]:
    """Return a table of the shapes and sizes that every stage leaves; the first row is the head.

    Indices are chosen at random, since only their number counts. Where the number itself depends on scores (a global
    ranking, measured proportions) or on counts of tokens, a possible number is shown and marked with ``~``. A share of
    the latency is estimated as the same share of MACs. An absolute latency cannot be predicted without timing: that
    stage and all after it show ``?``.

    Raises:
        PrunerError: the model cannot be read, or a stage cannot do what is asked.
    """
    original, *after = Predictor().stages(recipe, steps)
    assert original is not None
    rows = [["stage", *SIZES], ["original", *original.cells(original)]]
    for step, prediction in zip(steps, after, strict=True):
        rows.append([step.stage.name, *(prediction.cells(original) if prediction else NO_SIZES)])
    return rows


@dataclass(frozen=True, kw_only=True)
class PointRow:
    """Predicted result of the points of a sweep that differ only in their seeds.

    Attributes:
        values: varied arguments, without seeds.
        point: first of the points, or the first that cannot run.
        runs: number of the points.
        cells: those of :data:`SIZES`.
        problem: why ``point`` cannot run, empty if it can.
    """

    values: Mapping[str, Any]
    point: SweepPoint
    runs: int
    cells: list[str]
    problem: str = ""


def predict_points(points: Sequence[SweepPoint], unavailable: list[str]) -> list[PointRow]:
    """Predict the model that the last stage of every point leaves, as :func:`predict_stages` does.

    Args:
        unavailable: collects messages about inputs that this machine lacks.
    """
    predictor = Predictor()
    return [_predict_alike(predictor, values, alike, unavailable) for values, alike in _fold_seeds(points)]


def _predict_alike(
    predictor: Predictor, values: Mapping[str, Any], alike: Sequence[SweepPoint], unavailable: list[str]
) -> PointRow:
    """Check points that differ in seeds alone, and predict one of them."""
    cells, problem, point = NO_SIZES, "", alike[0]
    try:
        for point in alike:
            check_point(point, unavailable)
        original, *after = predictor.stages(point.recipe, point.steps)
        assert original is not None
        cells = next(filter(None, reversed([original, *after]))).cells(original)
    except PrunerError as error:
        problem = str(error).removesuffix(f" ({point.title})")
    return PointRow(values=values, point=point, runs=len(alike), cells=cells, problem=problem)


def sweep_cells(rows: Sequence[PointRow]) -> list[list[str]]:
    """Return the cells of a table with a row per point, head first; seeds have a column where there are several."""
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    seeds = any(row.runs > 1 for row in rows)
    head = [*_short_names(keys), *["seeds"] * seeds, *SIZES]
    body = []
    for row in rows:
        values = [str(row.values.get(key, "")) for key in keys]
        body.append([*values, *[str(row.runs)] * seeds, *row.cells])
    return [head, *body]


def dry_run_tables(cells: list[list[str]], width: int) -> tuple[str, list[TerminalTable]]:
    """Format the cells of a dry run for a terminal; costs are a table of their own where the width does not hold all.

    Args:
        cells: columns that name the row, then :data:`SIZES`.

    Returns:
        a line of the shapes that are the same in every row, "" without any; tables of all other columns.
    """
    labels = len(cells[0]) - len(SIZES)
    shared, cells = _take_shared_shapes(cells, labels)
    tables = terminal_tables(cells, width, labels)
    costs = cells[0].index("parameters", labels)
    if len(tables) > 1 and costs > labels:
        halves = [row[:costs] for row in cells], [[*row[:labels], *row[costs:]] for row in cells]
        tables = [part for half in halves for part in terminal_tables(half, width, labels)]
    return f"the same in every row: {shared}" if shared else "", tables


def _take_shared_shapes(cells: list[list[str]], labels: int) -> tuple[str, list[list[str]]]:
    """Remove the columns of shapes in which at least two rows have one value, and return them as text.

    >>> _take_shared_shapes([["stage", "layers", "hidden"], ["original", "30", "576"], ["depth", "24", "576"]], 1)
    ('hidden 576', [['stage', 'layers'], ['original', '30'], ['depth', '24']])
    """
    head, *body = cells
    shared = {}
    for i, name in enumerate(head):
        values = [row[i] for row in body if row[i]]
        if labels <= i < labels + len(SHAPES) and len(values) > 1 and len(set(values)) == 1:
            shared[i] = f"{name} {values[0]}"
    return ", ".join(shared.values()), [[cell for i, cell in enumerate(row) if i not in shared] for row in cells]


def _fold_seeds(points: Sequence[SweepPoint]) -> list[tuple[dict[str, Any], list[SweepPoint]]]:
    """Group points by their values without seeds, in order."""
    groups: dict[str, tuple[dict[str, Any], list[SweepPoint]]] = {}
    for point in points:
        seeds = (SEED, CALIBRATION_SEED)
        values = {key: value for key, value in point.values.items() if key.rpartition(".")[2] not in seeds}
        groups.setdefault(repr(values), (values, []))[1].append(point)
    return list(groups.values())


def _short_names(keys: Sequence[str]) -> list[str]:
    """Return the arguments' names without their stages, where these differ.

    >>> _short_names(["prune.taylor", "model"]), _short_names(["depth.seed", "width.seed"])
    (['taylor', 'model'], ['depth.seed', 'width.seed'])
    """
    short = [key.rpartition(".")[2] for key in keys]
    return short if len(set(short)) == len(short) else list(keys)


def _change(step: Step) -> Change | None:
    """Return how a stage changes shapes, None for a stage that changes none."""
    arguments, command = step.arguments(), step.stage.command
    task, trust = getattr(arguments, "task", None), getattr(arguments, "trust_remote_code", False)
    if isinstance(arguments, PruneArguments):
        settings = without_scores(resolve_settings(arguments))
        return Change(command=command, decisive=settings, task=task, trust_remote_code=trust)
    if isinstance(arguments, VocabArguments):
        return Change(command=command, decisive=arguments.keep)
    if command == "apply":
        return Change(command=command, decisive=arguments.plan, task=task, trust_remote_code=trust)
    return Change(command=command) if command == "to-uniform" else None


def _predict(before: Prediction, change: Change) -> Prediction:
    model, decisive = before.model, change.decisive
    if model is None:
        return before
    if isinstance(decisive, PruneSettings):
        after = _prune(decisive, _in_class_for(change.task, model, change.trust_remote_code))
    elif change.command == "vocab":
        after = _cut_vocabulary(decisive, model)
    elif change.command == "apply":
        plan = PruningPlan.load(str(decisive))
        model = _in_class_for(change.task or task_of_plan(plan), model, change.trust_remote_code)
        after = Prediction(model=apply(model, plan))
    else:
        after = Prediction(model=skeleton(type(model), uniform_config(model.config)).eval())
    return replace(after, estimated=before.estimated or after.estimated)


def _in_class_for(task: str | None, model: PreTrainedModel, trust_remote_code: bool) -> PreTrainedModel:
    """Return the model in the class of a task, if one is named."""
    if task is None or class_for(task, model.config) == type(model).__name__:
        return model
    config = copy.deepcopy(model.config)
    ask_for(task, config)
    return meta_model(config, trust_remote_code)


def _prune(settings: PruneSettings, model: PreTrainedModel) -> Prediction:
    widths, budget = settings.widths, settings.budget
    estimated = widths.scope != "local" or bool(widths.proportions) or widths.generations is not None
    timed = budget is not None and budget.kind == "target_latency"
    if budget is not None and timed:
        if read_target(budget.kind, budget.target, UNITS[budget.kind])[1] is not None:
            return Prediction(model=None)
        settings, estimated = replace(settings, budget=replace(budget, kind="target_macs")), True
    model = routed_to_fewer(settings.experts, model)
    try:
        return Prediction(model=make_plan(Planning(settings=settings), model).pruned, estimated=estimated)
    except TraceError:
        if settings.calibration.towers == LANGUAGE:
            raise
        return Prediction(model=None)  # some models find the places of images in a text by reading values
    except NotMet:
        if not timed:
            raise
        return Prediction(model=None)  # latency may be reached where MACs are not
    except PrunerError as error:
        if budget is None or not timed:
            raise
        raise PrunerError(f"--target_latency {budget.target}, taken as a share of MACs: {error}") from error


def _cut_vocabulary(keep: str | None, model: PreTrainedModel) -> Prediction:
    graph = trace(model)
    (unit,) = graph.of_kind("vocabulary")
    count = token_budget(keep, unit.size)[0] if keep else None
    if count is None:  # the texts would have to be read
        return Prediction(model=model, estimated=True)
    if count >= unit.size:
        return Prediction(model=model)
    plan = PruningPlan()
    plan.keep(unit, torch.arange(count), graph.shapes)
    return Prediction(model=apply(model, plan))

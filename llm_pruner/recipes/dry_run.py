"""Predict the shapes and sizes that every stage of a recipe leaves, without reading a weight."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from ..checkpoint.config import load_config, meta_model
from ..errors import PrunerError
from ..evaluation.cost import macs
from ..graph.units import trace
from ..importance.layers import BY_POSITION
from ..models.per_layer import layer_lists
from ..models.skeleton import parameter_count
from ..pruning.arguments import PruneArguments
from ..pruning.context import Planning
from ..pruning.planning import make_plan
from ..pruning.settings import PruneSettings, resolve_settings
from ..selection.budgets import NotMet
from ..selection.plan import PruningPlan
from ..surgery.apply import apply
from ..surgery.uniform import uniform_config
from ..vocabulary.arguments import VocabArguments
from ..vocabulary.choosing import token_budget
from .recipe import Recipe
from .steps import Step

MACS_TOKENS = 128
HEAD = [
    "stage",
    "layers",
    "hidden",
    "heads",
    "neurons",
    "vocabulary",
    "parameters",
    "",
    f"MACs ({MACS_TOKENS} tokens)",
    "",
]
UNKNOWN, ESTIMATED = "?", "~"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Model that a stage leaves, on the meta device; None if it cannot be predicted.

    Attributes:
        estimated: the sizes depend on scores, measurements or counts that a dry run does not make.
    """

    model: PreTrainedModel | None
    estimated: bool = False


def dry_run(recipe: Recipe, steps: list[Step]) -> list[list[str]]:
    """Return a table of what every stage leaves, head first.

    Indices are chosen at random, since only their number counts. Where the number itself depends on scores (a global
    ranking, measured proportions) or on counts of tokens, a possible number is shown and marked with ``~``. A share of
    the latency is estimated as the same share of MACs. An absolute latency cannot be predicted without timing: that
    stage and all after it show ``?``.
    """
    trust = any(getattr(step.arguments(), "trust_remote_code", False) for step in steps)
    original = meta_model(load_config(recipe.model, trust), trust)
    sizes = parameter_count(original), macs(original, MACS_TOKENS)
    current = Prediction(model=original)
    rows = [HEAD, _row("original", current, sizes)]
    for step in steps:
        after = _predict(step, current, trust)
        rows.append(_row(step.stage.name, after, sizes) if after else [step.stage.name, *[""] * (len(HEAD) - 1)])
        current = after or current
    return rows


def _row(name: str, prediction: Prediction, original: tuple[int, int]) -> list[str]:
    model = prediction.model
    if model is None:
        return [name, *[UNKNOWN] * (len(HEAD) - 1)]
    units = trace(model)
    by_kind = {kind: sorted({u.size for u in [*units.units, *units.frozen] if u.kind == kind}) for kind in HEAD[2:6]}
    widths = ["-".join(map(str, dict.fromkeys((sizes[0], sizes[-1])))) if sizes else "" for sizes in by_kind.values()]
    layers = "+".join(str(len(stack)) for stack in layer_lists(model).values())
    mark = ESTIMATED if prediction.estimated else ""
    sizes = parameter_count(model), macs(model, MACS_TOKENS)
    cells = [cell for n, whole in zip(sizes, original, strict=True) for cell in (f"{n:,}", f"{n / whole:.3f}")]
    return [name, layers, *widths, *(f"{mark}{cell}" for cell in cells)]


def _predict(step: Step, before: Prediction, trust: bool) -> Prediction | None:
    """Return what a stage leaves, None for a stage that changes no shape."""
    arguments, command, model = step.arguments(), step.stage.command, before.model
    changes_shape = isinstance(arguments, (PruneArguments, VocabArguments)) or command in ("apply", "to-uniform")
    if model is None or not changes_shape:
        return before if changes_shape else None
    if isinstance(arguments, PruneArguments):
        after = _prune(arguments, model)
    elif isinstance(arguments, VocabArguments):
        after = _cut_vocabulary(arguments, model)
    elif command == "apply":
        after = Prediction(model=apply(model, PruningPlan.load(arguments.plan)))
    else:
        after = Prediction(model=meta_model(uniform_config(model.config), trust))
    return replace(after, estimated=before.estimated or after.estimated)


def _prune(arguments: PruneArguments, model: PreTrainedModel) -> Prediction:
    settings = resolve_settings(arguments)
    widths, budget = settings.widths, settings.budget
    estimated = widths.scope == "global" or bool(widths.proportions)
    timed = budget is not None and budget.kind == "target_latency"
    if budget is not None and timed:
        if not _is_share(budget.target):
            return Prediction(model=None)
        settings, estimated = replace(settings, budget=replace(budget, kind="target_macs")), True
    try:
        return Prediction(model=make_plan(Planning(settings=_unscored(settings)), model).pruned, estimated=estimated)
    except NotMet:
        if not timed:
            raise
        return Prediction(model=None)  # latency may be reached where MACs are not
    except PrunerError as error:
        if not timed:
            raise
        raise PrunerError(f"--target_latency {arguments.target_latency}, taken as a share of MACs: {error}") from error


def _unscored(settings: PruneSettings) -> PruneSettings:
    """Return settings that choose as many indices, at random, and layers by position."""
    layers, widths = settings.layers, settings.widths
    criterion = layers.criterion if layers.criterion in BY_POSITION else "spaced_middle"
    proportions = {kind: share or 1.0 for kind, share in widths.proportions.items()}
    return replace(
        settings,
        scoring=replace(settings.scoring, criterion="random", cache=None),
        layers=replace(layers, criterion=criterion),
        widths=replace(widths, proportions=proportions, iterative_steps=1),
    )


def _is_share(target: str) -> bool:
    """Return True for a fraction such as 0.8, False for an amount such as 30ms.

    >>> _is_share("0.8"), _is_share("30ms"), _is_share("30")
    (True, False, False)
    """
    return bool(re.fullmatch(r"\s*(\d+(\.\d*)?|\.\d+)\s*", target)) and float(target) <= 1


def _cut_vocabulary(arguments: VocabArguments, model: PreTrainedModel) -> Prediction:
    graph = trace(model)
    (unit,) = graph.of_kind("vocabulary")
    count = token_budget(arguments.keep, unit.size)[0] if arguments.keep else None
    if count is None:  # the texts would have to be read
        return Prediction(model=model, estimated=True)
    if count >= unit.size:
        return Prediction(model=model)
    plan = PruningPlan()
    plan.keep(unit, torch.arange(count), graph.shapes)
    return Prediction(model=apply(model, plan))

"""What every stage of a recipe would leave, told from shapes: no weight is read."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from ..checkpoint.config import load_config, meta_model
from ..evaluation.cost import macs
from ..graph.units import trace
from ..importance.layers import BY_POSITION
from ..models.per_layer import layer_lists
from ..models.skeleton import parameter_count
from ..pruning.arguments import PruneArguments
from ..pruning.planning import Planning, make_plan
from ..pruning.settings import resolve_settings
from ..selection.plan import PruningPlan
from ..surgery.apply import apply
from ..surgery.uniform import uniform_config
from ..vocabulary.arguments import VocabArguments
from ..vocabulary.choosing import token_budget
from .recipe import Recipe
from .steps import Step

MACS_TOKENS = 128
HEADS = [
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


def dry_run(recipe: Recipe, steps: list[Step]) -> list[list[str]]:
    """The table of shapes, head first.

    Indices are chosen at random, since only their number counts here. Where the number itself depends on scores (a
    global ranking, measured proportions) or on a count of tokens, it is one that may be, marked with ``~``.
    """
    trust = any(step.arguments().trust_remote_code for step in steps if hasattr(step.arguments(), "trust_remote_code"))
    model = meta_model(load_config(recipe.model, trust), trust)
    whole = parameter_count(model), macs(model, MACS_TOKENS)
    rows = [HEADS, _row("original", model, whole, False)]
    about = False
    for step in steps:
        args = step.arguments()
        if isinstance(args, PruneArguments):
            model, guessed = _pruned(args, model)
        elif isinstance(args, VocabArguments):
            model, guessed = _cut(args, model)
        elif step.stage.command == "apply":
            model, guessed = apply(model, PruningPlan.load(args.plan)), False
        elif step.stage.command == "to-uniform":
            model, guessed = meta_model(uniform_config(model.config), trust), False
        else:
            rows.append([step.stage.name, *[""] * (len(HEADS) - 1)])
            continue
        about = about or guessed
        rows.append(_row(step.stage.name, model, whole, about))
    return rows


def _row(name: str, model: PreTrainedModel, whole: tuple[int, int], about: bool) -> list[str]:
    stacks = [str(len(stack)) for stack in layer_lists(model).values()]
    graph = trace(model)

    def sizes(kind: str) -> str:
        found = sorted({unit.size for unit in [*graph.units, *graph.frozen] if unit.kind == kind})
        return "" if not found else str(found[0]) if len(found) == 1 else f"{found[0]}-{found[-1]}"

    now = parameter_count(model), macs(model, MACS_TOKENS)
    mark = "~" if about else ""
    counts = [cell for n, w in zip(now, whole, strict=True) for cell in (f"{mark}{n:,}", f"{mark}{n / w:.3f}")]
    return [name, "+".join(stacks), sizes("hidden"), sizes("heads"), sizes("neurons"), sizes("vocabulary"), *counts]


def _pruned(args: PruneArguments, model: PreTrainedModel) -> tuple[PreTrainedModel, bool]:
    """Return what a prune stage leaves, and True if that is only an estimate."""
    settings = resolve_settings(args)
    widths, layers, budget = settings.widths, settings.layers, settings.budget
    guessed = widths.scope == "global" or bool(widths.proportions)
    if layers.criterion not in BY_POSITION:
        layers = replace(layers, criterion="spaced_middle")
    proportions = {kind: share or 1.0 for kind, share in widths.proportions.items()}
    if budget is not None and budget.kind == "target_latency":  # nothing is timed here
        budget, guessed = replace(budget, kind="target_macs"), True
    settings = replace(
        settings,
        scoring=replace(settings.scoring, criterion="random", cache=None),
        layers=layers,
        widths=replace(widths, proportions=proportions, iterative_steps=1),
        budget=budget,
    )
    return make_plan(Planning(settings=settings), model).pruned, guessed


def _cut(args: VocabArguments, model: PreTrainedModel) -> tuple[PreTrainedModel, bool]:
    graph = trace(model)
    (unit,) = graph.of_kind("vocabulary")
    count = token_budget(args.keep, unit.size)[0] if args.keep else None
    if count is None:  # the texts would have to be read
        return model, True
    plan = PruningPlan()
    plan.keep(unit, torch.arange(count), graph.shapes)
    return apply(model, plan) if count < unit.size else model, False

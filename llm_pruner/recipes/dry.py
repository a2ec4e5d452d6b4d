"""What every stage of a recipe would leave, told from shapes: no weight is read."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from ..arguments import VocabArguments
from ..checkpoint import load_config, meta_model
from ..evaluation import macs, parameter_count
from ..graph import layer_lists, trace
from ..importance import BY_POSITION
from ..pruning import PruneArguments, Stopwatch, make_plan
from ..selection import PruningPlan
from ..surgery import apply, in_memory, uniform_config
from ..vocabulary.choosing import room

if TYPE_CHECKING:
    from .recipe import Recipe
    from .work import Step

TOKENS = 128
HEADS = ["stage", "layers", "hidden", "heads", "neurons", "vocabulary", "parameters", "", f"MACs ({TOKENS} tokens)", ""]


def dry_run(recipe: Recipe, steps: list[Step]) -> list[list[str]]:
    """The table of shapes, head first.

    Indices are chosen at random, since only their number counts here. Where the number itself depends on scores (a
    global ranking, measured proportions) or on a count of tokens, it is one that may be, marked with ``~``.
    """
    trust = any(step.arguments().trust_remote_code for step in steps if hasattr(step.arguments(), "trust_remote_code"))
    model = meta_model(load_config(recipe.model, trust), trust)
    whole = parameter_count(model), macs(model, TOKENS)
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

    now = parameter_count(model), macs(model, TOKENS)
    mark = "~" if about else ""
    counts = [cell for n, w in zip(now, whole, strict=True) for cell in (f"{mark}{n:,}", f"{mark}{n / w:.3f}")]
    return [name, "+".join(stacks), sizes("hidden"), sizes("heads"), sizes("neurons"), sizes("vocabulary"), *counts]


def _pruned(args: PruneArguments, model: PreTrainedModel) -> tuple[PreTrainedModel, bool]:
    args = copy.copy(args)
    args.check()
    guessed = args.global_pruning or bool(args.shares)
    args.pruner_type = "random"
    if args.depth not in BY_POSITION:
        args.depth = "spaced_middle"
    if (args.shares or "").startswith("measured"):
        args.shares = ",".join(f"{kind}=1" for kind in args.proportions() or {})
    if args.target_latency is not None:  # nothing is timed here
        args.target_macs, args.target_latency, guessed = args.target_latency, None, True
    args.iterative_steps = 1
    return make_plan(args, model, None, Stopwatch(), in_memory).pruned, guessed


def _cut(args: VocabArguments, model: PreTrainedModel) -> tuple[PreTrainedModel, bool]:
    graph = trace(model)
    (unit,) = graph.of_kind("vocabulary")
    count = room(args.keep, unit.size)[0] if args.keep else None
    if count is None:  # the texts would have to be read
        return model, True
    plan = PruningPlan()
    plan.keep(unit, torch.arange(count), graph.shapes)
    return apply(model, plan) if count < unit.size else model, False

"""The points of a sweep: every combination of what a recipe varies, each a recipe of its own."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .recipe import Recipe, Stage, fault
from .stages import stage_arguments

SEED = "seed"
CALIBRATION_SEED = "calib_seed"
MODEL = "model"


@dataclass(frozen=True)
class SweepPoint:
    """One run: its number, what it varies, and the recipe with that put in."""

    number: int
    values: dict[str, Any]
    recipe: Recipe

    @property
    def name(self) -> str:
        return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in self.values.items()) or "run"


def points_of(recipe: Recipe) -> list[SweepPoint]:
    """All points, in the order of the file, the last key of a grid varying fastest, seeds fastest of all.

    Raises:
        PrunerError: a key is none of the recipe's, or lists to go side by side differ in length.
    """
    sweep = recipe.sweep or {}
    grid = sweep.get("grid") or {}
    combined: list[dict[str, Any]] = [
        dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
    ]
    beside = sweep.get("zip") or {}
    lengths = {key: len(values) for key, values in beside.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} has {count}" for key, count in lengths.items())
        raise fault(recipe.path, recipe.lines, ("sweep", "zip"), f"the lists of zip must be of one length: {counts}")
    if beside:
        rows = [dict(zip(beside, values, strict=True)) for values in zip(*beside.values(), strict=True)]
        combined = [one | row for one in combined for row in rows]
    if listed := sweep.get("points"):
        combined = [one | row for one in combined for row in listed]
    if recipe.seeds:
        combined = [one | {SEED: seed} for one in combined for seed in recipe.seeds]
    return [SweepPoint(i, values, varied(recipe, values)) for i, values in enumerate(combined, 1)]


def varied(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """A recipe with some arguments replaced: ``{"prune.taylor": "vectorize", "seed": 1}``."""
    stages, model = list(recipe.stages), recipe.model
    for key, value in values.items():
        if key == MODEL:
            model = value
            continue
        if key == SEED:
            stages = [_seeded(s, value) for s in stages]
            continue
        name, _, argument = key.partition(".")
        where = next(i for i, stage in enumerate(stages) if stage.name == name)
        stages[where] = _with(stages[where], argument, value)
    return replace(recipe, stages=stages, model=model, sweep=None, seeds=[])


def _seeded(stage: Stage, seed: int) -> Stage:
    """A stage with a seed: what it draws, and which calibration samples, unless the recipe says which."""
    names = [name for name in (SEED, CALIBRATION_SEED) if name in stage_arguments(stage.command)]
    for name in names:
        if name == SEED or name not in stage.arguments:
            stage = _with(stage, name, seed)
    return stage


def _with(stage: Stage, argument: str, value: Any) -> Stage:
    return replace(stage, arguments={**stage.arguments, argument: value})

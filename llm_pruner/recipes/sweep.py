"""The points of a sweep: every combination of the arguments that a recipe varies, each a recipe of its own."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..commands import COMMANDS
from ..errors import PrunerError
from ..files import check_file
from ..inputs import InputCheck
from .recipe import MODEL, Recipe, Stage
from .schema import Sweep, convert_argument
from .stages import stage_arguments
from .steps import Step, check_steps, evaluation_arguments, steps_of

SEED = "seed"
CALIBRATION_SEED = "calib_seed"
RUN_LOG = "run.log"  # log of a recipe, in its output folder

Values = dict[str, Any]


@dataclass(frozen=True)
class SweepPoint:
    """One run of a sweep: its number, the values that it varies, and the recipe with these values."""

    number: int
    values: Values
    recipe: Recipe

    @property
    def name(self) -> str:
        return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in self.values.items()) or "run"

    @property
    def title(self) -> str:
        """Number and name, for error messages."""
        return f"run {self.number}: {self.name}"

    @cached_property
    def steps(self) -> list[Step]:
        return steps_of(self.recipe)

    @property
    def folder(self) -> Path:
        """Output folder, which all points share."""
        return Path(self.recipe.output)

    @property
    def file(self) -> Path:
        """File that records how the run ended."""
        return self.folder / "points" / f"{self._label}.json"

    @property
    def lock(self) -> str:
        """Name of the lock that the process at work on the point holds."""
        return f"point-{self._label}"

    @property
    def _label(self) -> str:
        return f"{self.number:04}-{self.steps[-1].key[:8]}"


def points_of(recipe: Recipe) -> list[SweepPoint]:
    """Return all points, in the order of the file; the last key of a grid varies faster, seeds fastest.

    Raises:
        PrunerError: lists of ``zip`` differ in length, or two points do the same.
    """
    combinations = _combinations(recipe) if recipe.sweep else [{}]
    if recipe.seeds:
        combinations = [values | {SEED: seed} for values in combinations for seed in recipe.seeds]
    points = [SweepPoint(i, values, with_values(recipe, values)) for i, values in enumerate(combinations, 1)]
    first: dict[str, SweepPoint] = {}
    for point in points:
        if (same := first.setdefault(point.steps[-1].key, point)) is not point:
            message = f"{same.title} and run {point.number} have the same values in every stage: leave out one"
            raise recipe.source.fault(("sweep",), message)
    return points


def check_point(point: SweepPoint, unavailable: list[str] | None = None) -> None:
    """Refuse a run that cannot work, before its first stage.

    Args:
        unavailable: collects messages about inputs that this machine lacks; None makes them errors.

    Raises:
        PrunerError: with file and line, and in a sweep with the run.
    """
    recipe, note = point.recipe, f" ({point.title})" if point.values else ""
    check = InputCheck(written_later=point.folder, unavailable=unavailable)
    with check.flag("output", recipe.output):
        check_file(point.folder / RUN_LOG)
    try:
        evaluation = evaluation_arguments(recipe, recipe.model)
        evaluation.check()
        if recipe.evaluate is not None:
            COMMANDS["evaluate"].check_inputs(evaluation, check)
    except PrunerError as error:
        raise recipe.source.fault(("evaluate",), f"{error}{note}") from error
    check_steps(point.steps, recipe, check, note)


def _combinations(recipe: Recipe) -> list[Values]:
    sweep = recipe.sweep or Sweep()
    lengths = {key: len(values) for key, values in sweep.zip.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{key} has {count}" for key, count in lengths.items())
        raise recipe.source.fault(("sweep", "zip"), f"the lists of zip must be of one length: {counts}")
    grid = [dict(zip(sweep.grid, values, strict=True)) for values in itertools.product(*sweep.grid.values())]
    rows = [dict(zip(sweep.zip, values, strict=True)) for values in zip(*sweep.zip.values(), strict=True)]
    parts = itertools.product(grid, rows or [{}], sweep.points or [{}])
    return [one | row | listed for one, row, listed in parts]


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return a recipe with some arguments replaced: ``{"prune.taylor": "vectorize", "seed": 1}``."""
    stages, model = list(recipe.stages), recipe.model
    for key, value in values.items():
        if key == MODEL:
            model = value
        elif key == SEED:
            stages = [_with_seed(stage, value) for stage in stages]
        else:
            name, _, argument = key.partition(".")
            stages = [
                _with_argument(recipe, stage, argument, value) if stage.name == name else stage for stage in stages
            ]
    return replace(recipe, stages=tuple(stages), model=model, sweep=None, seeds=())


def _with_argument(recipe: Recipe, stage: Stage, argument: str, value: Any) -> Stage:
    name, converted = convert_argument(stage.command, argument, value, source=recipe.source, location=("sweep",))
    return _with(stage, name, converted)


def _with_seed(stage: Stage, seed: int) -> Stage:
    """Return a stage with a seed, also for its calibration samples unless the recipe seeds them itself."""
    for name in (SEED, CALIBRATION_SEED):
        if name in stage_arguments(stage.command) and (name == SEED or name not in stage.arguments):
            stage = _with(stage, name, seed)
    return stage


def _with(stage: Stage, name: str, value: Any) -> Stage:
    return replace(stage, arguments={**stage.arguments, name: value})

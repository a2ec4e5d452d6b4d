"""Recipes: stages, evaluation and sweep, read from YAML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..flags import at_home
from .schema import (
    Executor,
    RecipeFile,
    Sweep,
    check_stage_command,
    convert_argument,
    did_you_mean,
    validate,
    validate_arguments,
)
from .source import Location, Source, find_recipe, parse

MODEL = "model"  # key of a sweep that varies the model


@dataclass(frozen=True)
class Stage:
    """One stage: ``command`` with ``arguments`` under their first spelling, called ``name``."""

    command: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stages of a run, and what is varied and measured.

    Attributes:
        model: model that the first stage reads.
        output: folder of everything that is written.
        stages: stages in order.
        evaluate: arguments of the evaluation of the original and of every stage's checkpoint; None for none.
        sweep: arguments to vary (:mod:`llm_pruner.recipes.sweep`); None for one run.
        seeds: seeds to repeat every run with.
        executor: where the runs of a sweep take place (:mod:`llm_pruner.recipes.executors`).
        keep_models: keep the weights of a sweep's checkpoints once they are measured.
        source: file, for error messages.
    """

    model: str
    output: str
    stages: tuple[Stage, ...]
    evaluate: Mapping[str, Any] | None = None
    sweep: Sweep | None = None
    seeds: tuple[int, ...] = ()
    executor: Executor = field(default_factory=Executor)
    keep_models: bool = True
    source: Source = field(default_factory=Source, repr=False)

    @property
    def is_sweep(self) -> bool:
        return self.sweep is not None or bool(self.seeds)

    def stage(self, name: str) -> Stage | None:
        """Return the stage of a name, None if there is none."""
        return next((stage for stage in self.stages if stage.name == name), None)


def read(name: str | Path) -> Recipe:
    """Read a recipe: a YAML file, or a recipe of the library by its name.

    Raises:
        PrunerError: the file is missing or not YAML, or an entry is not valid; with the line.
    """
    document, source = parse(find_recipe(name))
    content = validate(RecipeFile, document, source)
    recipe = Recipe(
        model=content.model,
        output=at_home(content.output),
        stages=_read_stages(content.stages, source),
        evaluate=_read_evaluation(document, source),
        sweep=content.sweep,
        seeds=tuple(content.seeds),
        executor=content.executor,
        keep_models=not (content.sweep or content.seeds) if content.keep_models is None else content.keep_models,
        source=source,
    )
    if content.sweep is not None:
        _check_sweep(recipe, content.sweep)
    return recipe


def _read_evaluation(document: Mapping[str, Any], source: Source) -> dict[str, Any] | None:
    if "evaluate" not in document:
        return None
    return validate_arguments("evaluate", document["evaluate"], source, ("evaluate",), stage=False)


def _read_stages(entries: list[dict[Any, Any]], source: Source) -> tuple[Stage, ...]:
    stages: dict[str, Stage] = {}
    for i, entry in enumerate(entries):
        command = check_stage_command(entry, source, ("stages", i))
        arguments = validate_arguments(command, entry[command], source, ("stages", i, command))
        name = arguments.pop("name", command)
        if name in stages:
            raise source.fault(("stages", i), f"two stages are called {name!r}: give one another name")
        stages[name] = Stage(command, name, arguments)
    return tuple(stages.values())


def _check_sweep(recipe: Recipe, sweep: Sweep) -> None:
    for location, key, value in _varied_values(sweep):
        if key == MODEL:
            if not isinstance(value, str) or not value:
                raise recipe.source.fault(location, f"model {value!r} is not valid: give the name of a model, as text")
            continue
        name, _, argument = key.partition(".")
        stage = recipe.stage(name)
        if stage is None:
            names = [stage.name for stage in recipe.stages]
            problem = f"{key!r} is varied, and no stage is called {name!r}{did_you_mean(name, names)}"
            raise recipe.source.fault(location, problem)
        convert_argument(stage.command, argument, value, source=recipe.source, location=location)


def _varied_values(sweep: Sweep) -> Iterator[tuple[Location, str, Any]]:
    """Yield location, key and value of everything that a sweep varies."""
    for part, lists in (("grid", sweep.grid), ("zip", sweep.zip)):
        for key, values in lists.items():
            for i, value in enumerate(values):
                yield ("sweep", part, key, i), key, value
    for i, point in enumerate(sweep.points or ()):
        for key, value in point.items():
            yield ("sweep", "points", i, key), key, value

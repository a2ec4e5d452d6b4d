"""The schema of a recipe: pydantic models, those of stages made from the flags of their commands."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_args

from annotated_types import Ge, MinLen
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Strict,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ..commands import COMMANDS
from ..errors import PrunerError
from ..flags import ValueType, canonical_flags, read_share, split_list
from .arguments import ExecutorKind
from .source import Location, Source
from .stages import STAGES, is_chained, stage_arguments

SHOWN = 60  # characters of a bad value in an error
STAGE_NAME = r"^\w[\w.-]{0,59}$"

M = TypeVar("M", bound=BaseModel)
Positive = Annotated[int, Ge(1)]


class Section(BaseModel):
    """A part of a recipe; unknown keys are refused, values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Sweep(Section):
    """Arguments to vary: all combinations, lists side by side, or points one by one."""

    grid: dict[str, Annotated[list[Any], MinLen(1)]] = {}
    zip: dict[str, Annotated[list[Any], MinLen(1)]] = {}
    points: Annotated[list[Annotated[dict[str, Any], MinLen(1)]], MinLen(1)] | None = None

    @model_validator(mode="after")
    def _vary_something(self) -> Sweep:
        if not self.model_fields_set:
            raise PydanticCustomError("empty", "give grid, zip or points")
        return self


class Executor(Section):
    """Executor of a sweep and its resources; None stands for the executor's default.

    Attributes:
        jobs: jobs at a time.
        gpus: GPUs of each job, on each of its ``nodes``.
        processes: processes that train on each node.
        minutes: time limit of a job.
        setup: shell commands before a job.
        parameters: further options of sbatch.
    """

    kind: ExecutorKind = "local"
    jobs: Positive | None = None
    gpus: Annotated[int, Ge(0)] | None = None
    nodes: Positive = 1
    processes: Positive | None = None
    cpus: Positive = 8
    memory: str | None = None
    minutes: Positive = 24 * 60
    partition: str | None = None
    setup: list[str] | None = None
    parameters: dict[str, Any] = {}


def _executor_of_kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


def _check_distinct(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise PydanticCustomError("repeated", "give every seed once")
    return seeds


class RecipeFile(Section):
    """The entries of a recipe; its stages and its evaluation are checked by the models of their commands."""

    model: Annotated[str, MinLen(1)]
    output: Annotated[str, MinLen(1)]
    evaluate: dict[Any, Any] | None = None
    stages: Annotated[list[dict[Any, Any]], MinLen(1)]
    sweep: Sweep | None = None
    seeds: Annotated[list[Annotated[int, Ge(0)]], AfterValidator(_check_distinct)] = []
    executor: Annotated[Executor, BeforeValidator(_executor_of_kind)] = Executor()
    keep_models: bool | None = None


def _whole_number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value  # 1e4


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _share(value: Any) -> Any:
    try:
        return read_share(value) if isinstance(value, str) and value.endswith("%") else value
    except ValueError:
        return value


def _entries(value: Any) -> Any:
    value = _number_as_text(value)
    return split_list(value) if isinstance(value, str) else value


def value_annotation(kind: ValueType) -> Any:
    """Return the annotation of a flag in a recipe: numbers may stand for text, 1e4 for an integer, "a,b" for a list."""
    scalar: Any = {
        bool: bool,
        int: Annotated[int, BeforeValidator(_whole_number)],
        float: Annotated[float, Strict()],
        str: Annotated[str, BeforeValidator(_number_as_text)],
    }[kind.convert]
    if kind.is_share:
        scalar = Annotated[float, Strict(), BeforeValidator(_share)]
    if kind.choices:
        scalar = Literal[kind.choices]
    annotation = Annotated[list[scalar], BeforeValidator(_entries)] if kind.several else scalar
    return annotation | None if kind.optional else annotation


@cache
def arguments_model(command: str, *, stage: bool = True) -> type[BaseModel]:
    """Return the model of a command's arguments, under all spellings; that of a stage also takes a name.

    A stage that reads several models, such as ``evaluate``, may name more of them; the section ``evaluate`` of a recipe
    may not.
    """
    kinds = stage_arguments(command)
    entries: dict[str, Any] = {
        name: (value_annotation(kind), None) for name, kind in kinds.items() if stage or not is_chained(command, name)
    }
    if stage:
        entries["name"] = (Annotated[str, StringConstraints(pattern=STAGE_NAME)], command)
    return create_model(command, __base__=Section, **entries)


def validate(model: type[M], value: Any, source: Source, location: Location = ()) -> M:
    """Check a part of a document.

    Raises:
        PrunerError: a key is unknown or missing, or a value is not valid; with file and line.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _first_fault(error, model, source, location) from error


def validate_arguments(
    command: str, given: Any, source: Source, location: Location, *, stage: bool = True
) -> dict[str, Any]:
    """Check arguments of a command; return those that are given, converted, under their first spelling.

    Raises:
        PrunerError: as :func:`validate`; or an argument is given under two spellings.
    """
    section = validate(arguments_model(command, stage=stage), {} if given is None else given, source, location)
    canonical = canonical_flags(COMMANDS[command].arguments_class) | {"name": "name"}
    arguments: dict[str, Any] = {}
    for spelling, value in section.model_dump(exclude_unset=True).items():
        if canonical[spelling] in arguments:
            raise source.fault((*location, spelling), f"{spelling} and {canonical[spelling]} are one flag: give one")
        arguments[canonical[spelling]] = value
    return arguments


def convert_argument(command: str, name: str, value: Any, *, source: Source, location: Location) -> tuple[str, Any]:
    """Return the first spelling of an argument of a stage, and its value as the command takes it.

    Raises:
        PrunerError: the stage has no such argument, or the value is not valid; with file and line.
    """
    kinds = stage_arguments(command)
    if name not in kinds:
        raise source.fault(location, f"{command} has no argument {name!r}{_hint(command, name, kinds)}")
    try:
        converted = TypeAdapter(value_annotation(kinds[name]), config=Section.model_config).validate_python(value)
    except ValidationError as error:
        raise _first_fault(error, None, source, location) from error
    return canonical_flags(COMMANDS[command].arguments_class)[name], converted


def check_stage_command(entry: Mapping[Any, Any], source: Source, location: Location) -> str:
    """Return the command of an entry of ``stages``.

    Raises:
        PrunerError: the entry is not one known command with its arguments.
    """
    if len(entry) != 1:
        raise source.fault(location, f"a stage is one command with its arguments, not {len(entry)}")
    (command,) = entry
    if command not in STAGES:
        raise source.fault((*location, command), f"unknown stage {command!r}{did_you_mean(str(command), STAGES)}")
    return str(command)


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return the end of an error about an unknown word: the nearest known one, or all of them."""
    words = list(words)
    nearest = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else f"; choose from {', '.join(sorted(words))}"


def _first_fault(
    error: ValidationError, model: type[BaseModel] | None, source: Source, location: Location
) -> PrunerError:
    """Return the first error of a document; unknown keys come first, since they explain missing ones."""

    def order(one: Any) -> tuple[bool, int]:
        return one["type"] != "extra_forbidden", source.line((*location, *one["loc"]))

    first = min(error.errors(), key=order)
    where = (*location, *first["loc"])
    name = where[-1] if where else "the recipe"
    if first["type"] in ("extra_forbidden", "invalid_key"):
        known = _section_at(model, first["loc"][:-1]).model_fields
        command = str(where[-2]) if len(where) > 1 else ""
        return source.fault(where, f"unknown key {str(name)!r}{_hint(command, str(name), known)}")
    if first["type"] == "missing":
        return source.fault(where[:-1], f"{name!r} is missing")
    shown, reason = repr(first["input"]), first["msg"]
    shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
    return source.fault(where, f"{name} {shown} is not valid: {reason[0].lower()}{reason[1:]}")


def _hint(command: str, name: str, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown argument of a command."""
    set_by_recipe = command in STAGES and is_chained(command, name)
    return ": the recipe sets it, from its model and output" if set_by_recipe else did_you_mean(name, known)


def _section_at(model: Any, location: Location) -> type[BaseModel]:
    for part in location:
        annotation = model.model_fields[part].annotation
        model = next(a for a in (annotation, *get_args(annotation)) if hasattr(a, "model_fields"))
    return model

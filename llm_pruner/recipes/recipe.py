"""Reading a recipe: YAML, checked against a schema made of the commands' own arguments, errors with line numbers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from ..errors import PrunerError
from .stages import STAGES, schema_of, stage_arguments

Path_ = tuple[Any, ...]


class Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-4 for a string, and a key that is there twice for the last one; this does neither."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+)$"),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class Stage:
    """One stage: ``command`` with ``arguments``, called ``name``."""

    command: str
    name: str
    arguments: Mapping[str, Any]


@dataclass
class Recipe:
    """What a file says.

    Attributes:
        model: that the first stage reads.
        output: folder of everything that is written.
        stages: in order.
        evaluate: arguments of an evaluation of the original and of what every stage leaves; None for none.
        sweep: what to vary (:mod:`llm_pruner.recipes.points`); None for one run.
        seeds: run everything with each of them.
        executor: where runs of a sweep take place (:mod:`llm_pruner.recipes.executors`).
        keep_models: whether the weights of a sweep's results stay once they are measured.
        path: of the file.
    """

    model: str
    output: str
    stages: list[Stage]
    evaluate: dict[str, Any] | None = None
    sweep: dict[str, Any] | None = None
    seeds: list[int] = field(default_factory=list)
    executor: dict[str, Any] = field(default_factory=dict)
    keep_models: bool = True
    path: str = ""
    lines: dict[Path_, int] = field(default_factory=dict, repr=False)


def read(path: str | Path) -> Recipe:
    """Read a recipe.

    Raises:
        PrunerError: the file is missing, no YAML, or says what no command knows; with the line.
    """
    document, lines = parsed(path)
    check(document, lines, str(path))
    return recipe_of(document, lines, str(path))


def parsed(path: str | Path) -> tuple[Any, dict[Path_, int]]:
    """A YAML file, and the line of every entry in it."""
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PrunerError(f"cannot read the recipe {path}: {error}") from error
    try:
        node = yaml.compose(content, Loader)
        if node is None:
            raise PrunerError(f"the recipe {path} is empty")
        lines = dict(_lines(node, ()))
        return Loader(content).construct_document(node), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise PrunerError(f"{path}{where}: {getattr(error, 'problem', None) or error}") from error
    except RecursionError as error:
        raise PrunerError(f"{path}: nested too deep, or an anchor holds itself") from error


def _lines(node: yaml.Node, path: Path_) -> Iterator[tuple[Path_, int]]:
    yield path, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen: set[Any] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
            yield from _lines(value, (*path, key.value))
            yield (*path, key.value), key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield from _lines(value, (*path, i))


_VALUES = {"type": "array", "minItems": 1}
SWEEP = {
    "type": "object",
    "properties": {
        "grid": {"type": "object", "additionalProperties": _VALUES},
        "zip": {"type": "object", "additionalProperties": _VALUES},
        "points": {"type": "array", "minItems": 1, "items": {"type": "object", "minProperties": 1}},
    },
    "minProperties": 1,
    "additionalProperties": False,
}
EXECUTOR = {
    "type": ["object", "string"],
    "properties": {
        "kind": {"type": "string"},
        "jobs": {"type": "integer", "minimum": 1},
        "gpus": {"type": "integer", "minimum": 0},
        "nodes": {"type": "integer", "minimum": 1},
        "processes": {"type": "integer", "minimum": 1},
        "cpus": {"type": "integer", "minimum": 1},
        "memory": {"type": "string"},
        "minutes": {"type": "integer", "minimum": 1},
        "partition": {"type": "string"},
        "setup": {"type": "array", "items": {"type": "string"}},
        "parameters": {"type": "object"},
    },
    "additionalProperties": False,
}


def arguments_schema(command: str) -> dict[str, Any]:
    fields = {name: schema_of(kind) for name, kind in stage_arguments(command).items()}
    return {"type": ["object", "null"], "properties": fields, "additionalProperties": False}


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe."""
    stages = []
    for command in STAGES:
        arguments = arguments_schema(command)
        if command == "evaluate":  # others, to compare the model at hand with
            for name in ("model", "models"):
                arguments["properties"][name] = {"type": ["string", "array"], "items": {"type": "string"}}
        arguments["properties"] = {
            "name": {"type": "string", "pattern": r"^[\w][\w.-]{0,59}$"},
            **arguments["properties"],
        }
        stages.append({"properties": {command: arguments}, "required": [command], "additionalProperties": False})
    return {
        "type": "object",
        "properties": {
            "model": {"type": "string", "minLength": 1},
            "output": {"type": "string", "minLength": 1},
            "evaluate": arguments_schema("evaluate"),
            "stages": {"type": "array", "minItems": 1, "items": {"type": "object"}},
            "sweep": SWEEP,
            "seeds": {"type": "array", "items": {"type": "integer", "minimum": 0}, "uniqueItems": True},
            "executor": EXECUTOR,
            "keep_models": {"type": "boolean"},
        },
        "required": ["model", "output", "stages"],
        "additionalProperties": False,
        "$defs": {command: stage for command, stage in zip(STAGES, stages, strict=True)},
    }


def check(document: Any, lines: Mapping[Path_, int], path: str) -> None:
    """Raises: PrunerError: with the line, for the first thing in a recipe that no command knows."""
    whole = schema()
    _checked(document, whole, (), lines, path)
    for i, stage in enumerate(document["stages"]):
        where: Path_ = ("stages", i)
        if len(stage) != 1:
            raise fault(path, lines, where, f"a stage is one command with its arguments, not {len(stage)}")
        (command,) = stage
        if command not in STAGES:
            raise fault(path, lines, (*where, command), f"unknown stage {command!r}{near(command, STAGES)}")
        _checked(stage, whole["$defs"][command], where, lines, path)
    for where, key, value in _swept(document.get("sweep") or {}):
        if key == "model":
            continue
        commands = {(entry[c] or {}).get("name", c): c for entry in document["stages"] for c in entry}
        name, _, argument = key.partition(".")
        if name not in commands:
            raise fault(path, lines, where, f"{key!r} is varied, and no stage is called {name!r}{near(name, commands)}")
        known = stage_arguments(commands[name])
        if argument not in known:
            raise fault(path, lines, where, f"stage {name!r} has no argument {argument!r}{near(argument, known)}")
        _checked(value, schema_of(known[argument]), where, lines, path)


def _swept(sweep: Mapping[str, Any]) -> Iterator[tuple[Path_, str, Any]]:
    """What a sweep varies: where it is said, the key, a value."""
    for part in ("grid", "zip"):
        for key, values in (sweep.get(part) or {}).items():
            for i, value in enumerate(values):
                yield ("sweep", part, key, i), key, value
    for i, values in enumerate(sweep.get("points") or []):
        for key, value in values.items():
            yield ("sweep", "points", i, key), key, value


def _checked(value: Any, rules: dict[str, Any], at: Path_, lines: Mapping[Path_, int], path: str) -> None:
    errors = jsonschema.Draft202012Validator(rules).iter_errors(value)

    def order(error: jsonschema.ValidationError) -> tuple[list[str], bool]:
        return [str(part) for part in error.absolute_path], error.validator != "additionalProperties"

    error = next(iter(sorted(errors, key=order)), None)
    if error is None:
        return
    where = (*at, *error.absolute_path)
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = error.schema["properties"]
        unknown = next(key for key in error.instance if key not in known)
        raise fault(path, lines, (*where, unknown), f"unknown key {unknown!r}{near(str(unknown), known)}")
    if error.validator == "required":
        missing = next(name for name in error.validator_value if name not in error.instance)
        raise fault(path, lines, where, f"{missing!r} is missing")
    name = where[-1] if where else "the recipe"
    if error.validator == "type":
        wanted = error.validator_value if isinstance(error.validator_value, list) else [error.validator_value]
        raise fault(path, lines, where, f"{name} is {error.instance!r}; it takes {' or '.join(wanted)}")
    raise fault(path, lines, where, f"{name}: {error.message}")


def near(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(known))}"


def fault(path: str, lines: Mapping[Path_, int], where: Path_, message: str) -> PrunerError:
    while where and where not in lines:
        where = where[:-1]
    return PrunerError(f"{path}:{lines.get(where, 1)}: {message}")


def recipe_of(document: Mapping[str, Any], lines: Mapping[Path_, int], path: str) -> Recipe:
    """A checked document as a recipe."""
    stages: list[Stage] = []
    for i, entry in enumerate(document["stages"]):
        ((command, given),) = entry.items()
        given = dict(given or {})
        name = given.pop("name", command)
        if any(stage.name == name for stage in stages):
            raise fault(path, lines, ("stages", i), f"two stages are called {name!r}: give one a name of its own")
        stages.append(Stage(command, name, given))
    executor = document.get("executor", {})
    return Recipe(
        document["model"],
        document["output"],
        stages,
        dict(document["evaluate"] or {}) if "evaluate" in document else None,
        document.get("sweep"),
        list(document.get("seeds", [])),
        {"kind": executor} if isinstance(executor, str) else dict(executor),
        document.get("keep_models", "sweep" not in document and not document.get("seeds")),
        path,
        dict(lines),
    )

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
from .stages import KINDS, schema_of

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
        path: of the file.
    """

    model: str
    output: str
    stages: list[Stage]
    evaluate: dict[str, Any] | None = None
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


def arguments_schema(command: str) -> dict[str, Any]:
    fields = {name: schema_of(kind) for name, kind in KINDS[command].fields.items()}
    if command == "evaluate":  # beside the model at hand, others may be named
        fields["models"] = {"type": "array", "items": {"type": "string"}}
    return {"type": ["object", "null"], "properties": fields, "additionalProperties": False}


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe."""
    stages = []
    for command in KINDS:
        arguments = arguments_schema(command)
        arguments["properties"] = {"name": {"type": "string", "pattern": r"^[\w-]{1,60}$"}, **arguments["properties"]}
        stages.append({"properties": {command: arguments}, "required": [command], "additionalProperties": False})
    return {
        "type": "object",
        "properties": {
            "model": {"type": "string", "minLength": 1},
            "output": {"type": "string", "minLength": 1},
            "evaluate": arguments_schema("evaluate"),
            "stages": {"type": "array", "minItems": 1, "items": {"type": "object"}},
        },
        "required": ["model", "output", "stages"],
        "additionalProperties": False,
        "$defs": {command: stage for command, stage in zip(KINDS, stages, strict=True)},
    }


def check(document: Any, lines: Mapping[Path_, int], path: str) -> None:
    """Raises: PrunerError: with the line, for the first thing in a recipe that no command knows."""
    whole = schema()
    _checked(document, whole, (), lines, path)
    for i, stage in enumerate(document["stages"]):
        where: Path_ = ("stages", i)
        if len(stage) != 1:
            raise _error(path, lines, where, f"a stage is one command with its arguments, not {len(stage)}")
        (command,) = stage
        if command not in KINDS:
            raise _error(path, lines, (*where, command), f"unknown stage {command!r}{_near(command, KINDS)}")
        _checked(stage, whole["$defs"][command], where, lines, path)


def _checked(value: Any, rules: dict[str, Any], at: Path_, lines: Mapping[Path_, int], path: str) -> None:
    errors = jsonschema.Draft202012Validator(rules).iter_errors(value)
    error = next(iter(sorted(errors, key=lambda e: [str(part) for part in e.absolute_path])), None)
    if error is None:
        return
    where = (*at, *error.absolute_path)
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = error.schema["properties"]
        unknown = next(key for key in error.instance if key not in known)
        raise _error(path, lines, (*where, unknown), f"unknown key {unknown!r}{_near(str(unknown), known)}")
    if error.validator == "required":
        missing = next(name for name in error.validator_value if name not in error.instance)
        raise _error(path, lines, where, f"{missing!r} is missing")
    name = where[-1] if where else "the recipe"
    if error.validator == "type":
        wanted = error.validator_value if isinstance(error.validator_value, list) else [error.validator_value]
        raise _error(path, lines, where, f"{name} is {error.instance!r}; it takes {' or '.join(wanted)}")
    raise _error(path, lines, where, f"{name}: {error.message}")


def _near(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(known))}"


def _error(path: str, lines: Mapping[Path_, int], where: Path_, message: str) -> PrunerError:
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
        if any(stage.name == name for stage in stages) and "name" in (entry[command] or {}):
            raise _error(path, lines, ("stages", i), f"two stages are called {name!r}")
        stages.append(Stage(command, name, given))
    evaluate = document.get("evaluate", None)
    return Recipe(
        document["model"],
        document["output"],
        stages,
        None if "evaluate" not in document else dict(evaluate or {}),
        path,
        dict(lines),
    )

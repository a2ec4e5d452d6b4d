"""Commands as stages of a recipe: which arguments they take, and how one's output becomes the next one's input."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..commands import COMMANDS, Chaining
from ..flags import ValueType, canonical_flags, split_list, value_type

DONE = "stage.json"  # written last into the folder of a stage: what made it
STAGES = [name for name, command in COMMANDS.items() if command.chaining is not None]


def chaining(command: str) -> Chaining:
    """Return how a command is chained."""
    found = COMMANDS[command].chaining
    assert found is not None
    return found


def stage_arguments(command: str) -> dict[str, ValueType]:
    """Return the arguments that a recipe may give to a stage, with their types, under all their spellings."""
    arguments_class, rules = COMMANDS[command].arguments_class, chaining(command)
    decided = {rules.reads, *rules.writes}
    types = {one.name: value_type(arguments_class, one.name) for one in fields(arguments_class)}
    return {spelling: types[name] for spelling, name in canonical_flags(arguments_class).items() if name not in decided}


def with_defaults(command: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a stage under their first spelling, with the defaults that stages have."""
    known = canonical_flags(COMMANDS[command].arguments_class)
    named = {known.get(name, name): value for name, value in given.items()}
    return chaining(command).defaults(named) | named


def build_arguments(command: str, given: Mapping[str, Any], model: str | None, folder: Path) -> Any:
    """Build the arguments of a stage that reads ``model`` and writes to ``folder``.

    Raises:
        PrunerError: a value is not valid.
    """
    arguments_class, rules = COMMANDS[command].arguments_class, chaining(command)
    values = {
        name: convert_value(value, value_type(arguments_class, name))
        for name, value in with_defaults(command, given).items()
    }
    if rules.reads and model:
        several = value_type(arguments_class, rules.reads).several
        # Models that a recipe names come first: the first is the one that others are compared to.
        values[rules.reads] = [*_entries(values.get(rules.reads)), model] if several else model
    writes = {
        name: value.format(folder=folder) if isinstance(value, str) else value for name, value in rules.writes.items()
    }
    return arguments_class(**values | writes)


def resulting_checkpoint(command: str, arguments: Any, folder: Path) -> Path | None:
    """Return the checkpoint that a stage leaves, None where it leaves none."""
    leaves = chaining(command).leaves
    return None if leaves is None else folder / leaves(arguments)


def _entries(value: Any) -> list[str]:
    return split_list(value) if isinstance(value, str) else list(value or ())


def schema_of(kind: ValueType) -> dict[str, Any]:
    """Return the JSON schema of an argument: numbers may be written for strings, and lists with commas."""
    names = {bool: ["boolean"], int: ["integer"], float: ["number"]}.get(kind.convert, ["string", "number"])
    if kind.several:
        names = [*names, "array"]
    return {"type": [*names, *["null"] * kind.optional], "items": {"type": ["string", "number"]}}


def convert_value(value: Any, kind: ValueType) -> Any:
    """Return a value of a recipe as the command takes it."""
    if value is None or isinstance(value, bool):
        return value
    if kind.several:
        return [str(item) for item in (value if isinstance(value, list) else split_list(str(value)))]
    if kind.convert is int and isinstance(value, float) and value.is_integer():  # 1e4
        return int(value)
    return kind.convert(value) if kind.convert in (float, str) else value


def note_of(folder: Path) -> dict[str, Any] | None:
    """Return what is noted of a finished stage, None where the stage is not finished."""
    try:
        return json.loads((folder / DONE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None

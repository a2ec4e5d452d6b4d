"""Commands as stages of a recipe: their arguments, and how one's output becomes the next one's input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..commands import COMMANDS, Chaining
from ..files import read_json
from ..flags import ValueType, canonical_flags, value_type

DONE = "stage.json"  # record of a finished stage; the last file that a stage writes
STAGES = [name for name, command in COMMANDS.items() if command.chaining is not None]


def chaining(command: str) -> Chaining:
    """Return how a command is chained."""
    rules = COMMANDS[command].chaining
    assert rules is not None
    return rules


def is_chained(command: str, spelling: str) -> bool:
    """Return True if a recipe sets the flag of this spelling: the model to read, or the folder to write."""
    name, rules = canonical_flags(COMMANDS[command].arguments_class).get(spelling), chaining(command)
    return name is not None and name in (rules.reads, *rules.writes)


def stage_arguments(command: str) -> dict[str, ValueType]:
    """Return the arguments that a recipe may give to a stage, with their types, under all their spellings.

    The model to read is one of them only if the command reads several.
    """
    arguments_class, rules = COMMANDS[command].arguments_class, chaining(command)
    kinds = {one.name: value_type(arguments_class, one.name) for one in fields(arguments_class)}
    closed = {*rules.writes, "quiet", *([rules.reads] if rules.reads and not kinds[rules.reads].several else [])}
    return {spelling: kinds[name] for spelling, name in canonical_flags(arguments_class).items() if name not in closed}


def with_defaults(command: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a stage with the defaults that stages have."""
    return chaining(command).defaults(given) | dict(given)


def build_arguments(command: str, given: Mapping[str, Any], model: str | None, folder: Path) -> Any:
    """Build the arguments of a stage that reads ``model`` and writes to ``folder``.

    Raises:
        PrunerError: a value is not valid.
    """
    arguments_class, rules = COMMANDS[command].arguments_class, chaining(command)
    values = with_defaults(command, given)
    if rules.reads and model:
        several = value_type(arguments_class, rules.reads).several
        # Models that a recipe names come first: others are compared to the first one.
        values[rules.reads] = [*(values.get(rules.reads) or ()), model] if several else model
    writes = {
        name: value.format(folder=folder) if isinstance(value, str) else value for name, value in rules.writes.items()
    }
    return arguments_class(**values | writes)


def resulting_checkpoint(command: str, arguments: Any, folder: Path) -> Path | None:
    """Return the checkpoint that a stage leaves, None for a command that leaves none."""
    leaves = chaining(command).leaves
    return None if leaves is None else folder / leaves(arguments)


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a finished stage, None for a stage that is not finished."""
    try:
        return dict(read_json(folder / DONE))
    except (OSError, ValueError):
        return None

"""What a stage of a recipe may be: the commands, and how one's output becomes the next one's input."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any

from ..arguments import (
    ApplyArguments,
    EvaluateArguments,
    ReportArguments,
    UniformArguments,
    VocabArguments,
)
from ..pruning import PruneArguments
from ..recovery import RecoverArguments

ADAPTERS = ("lora", "dora")
DONE = "stage.json"  # written last into the folder of a stage: what made it


@dataclass(frozen=True)
class Kind:
    """A command as a stage.

    Attributes:
        arguments: its arguments.
        reads: the argument that names the model it works on; None where it works on none.
        sets: what a recipe decides, given the folder of the stage.
        result: the folder of the checkpoint that it leaves there, for arguments; None where it leaves none.
    """

    arguments: type
    reads: str | None
    sets: Callable[[Path], dict[str, Any]]
    result: Callable[[Any, Path], Path | None]

    @property
    def fields(self) -> dict[str, Any]:
        """The arguments that a recipe may give, with their types."""
        decided = {self.reads, *self.sets(Path())}
        types = typing.get_type_hints(self.arguments)
        return {f.name: types[f.name] for f in fields(self.arguments) if f.name not in decided}

    def build(self, given: Mapping[str, Any], model: str | None, folder: Path) -> Any:
        """The arguments of a stage that reads ``model`` and writes to ``folder``."""
        fields = self.fields
        values = {name: converted(value, fields[name]) for name, value in given.items() if name != self.reads}
        reads: dict[str, Any] = {self.reads: model} if self.reads and model else {}
        if self.reads == "models":  # those named come first: the first is compared to
            reads = {"models": [*given.get("models", []), *([model] if model else [])]}
        return self.arguments(**(reads | values | self.sets(folder)))


def _pruned(folder: Path) -> dict[str, Any]:
    return {"output_root": str(folder.parent), "save_ckpt_log_name": folder.name, "save_model": True}


def _recovered(args: Any, folder: Path) -> Path:
    return folder / "merged" if args.method in ADAPTERS else folder


KINDS: dict[str, Kind] = {
    "prune": Kind(PruneArguments, "base_model", _pruned, lambda _, folder: folder),
    "recover": Kind(RecoverArguments, "prune_model", lambda f: {"output_dir": str(f)}, _recovered),
    "vocab": Kind(VocabArguments, "model", lambda f: {"output_dir": str(f)}, lambda _, folder: folder),
    "apply": Kind(ApplyArguments, "checkpoint", lambda f: {"out": str(f)}, lambda _, folder: folder),
    "to-uniform": Kind(UniformArguments, "checkpoint", lambda f: {"out": str(f)}, lambda _, folder: folder),
    "evaluate": Kind(EvaluateArguments, "models", lambda f: {"output": str(f)}, lambda _, folder: None),
    "report": Kind(ReportArguments, None, lambda f: {"output": str(f / "report.html")}, lambda _, folder: None),
}


def completed(command: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, and other defaults than the command's: a recipe measures by itself, and goes on with what a stage
    leaves."""
    if command == "prune":
        return {"eval_datasets": ""} | dict(given)
    if command == "recover":
        adapter = given.get("method", RecoverArguments.method) in ADAPTERS
        return {"merge": adapter, "resume_from_checkpoint": "auto"} | dict(given)
    return dict(given)


def plain(kind: Any) -> list[type]:
    """The types that a value may have."""
    if typing.get_origin(kind) in (typing.Union, UnionType):
        return [t for part in typing.get_args(kind) for t in plain(part)]
    return [kind]


def schema_of(kind: Any) -> dict[str, Any]:
    """A JSON schema of an argument: numbers may be written for strings, and lists for what is given by comma."""
    names: list[str] = []
    for one in plain(kind):
        names += {
            bool: ["boolean"],
            int: ["integer"],
            float: ["number"],
            str: ["string", "number", "array"],
            type(None): ["null"],
        }.get(one, ["array"])
    items = {"type": ["string", "number"]}
    return {"type": list(dict.fromkeys(names)), "items": items}


def converted(value: Any, kind: Any) -> Any:
    """A value of a recipe as the command wants it."""
    kinds = plain(kind)
    if int in kinds and isinstance(value, float) and value.is_integer():  # 1e4
        return int(value)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if str in kinds and isinstance(value, list):
        return ",".join(str(v) for v in value)
    if str in kinds and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return value


def done(folder: Path) -> dict[str, Any] | None:
    """What is noted of a stage that was finished, None where it was not."""
    try:
        return json.loads((folder / DONE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None

"""Running a recipe: what is finished not again, what was interrupted from where it was, one growing table."""

from __future__ import annotations

import csv
import fcntl
import gc
import hashlib
import io
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..arguments import EvaluateArguments, RunArguments
from ..errors import PrunerError
from ..files import write_text
from ..logs import log, logging_to
from ..measure import measured, shown
from ..provenance import provenance
from .dry import dry_run
from .recipe import Recipe, Stage, read
from .stages import DONE, KINDS, completed, converted, done

LOG_FILE = "run.log"


@dataclass(frozen=True)
class Step:
    """A stage of a run: what it reads, where it writes.

    Attributes:
        key: a hash of the stage, of those before it and of the model: equal for equal work.
        model: that it reads, if it reads one.
        folder: that it writes.
    """

    stage: Stage
    key: str
    model: str
    folder: Path

    @property
    def given(self) -> dict[str, Any]:
        return completed(self.stage.command, self.stage.arguments)

    def arguments(self) -> Any:
        return KINDS[self.stage.command].build(self.given, self.model, self.folder)

    def result(self) -> str:
        """The model that the next stage reads."""
        left = KINDS[self.stage.command].result(self.arguments(), self.folder)
        return self.model if left is None else str(left)


def run(args: RunArguments) -> Path | None:
    """Run a recipe; returns its output folder.

    Raises:
        PrunerError: the recipe is wrong, a stage cannot do its work, or another process is at it.
    """
    args.check()
    recipe = read(args.recipe)
    recipe.model, recipe.output = args.model or recipe.model, args.output or recipe.output
    steps = list(steps_of(recipe))
    for step in steps:
        _checked(recipe, step)
    if args.dry_run:
        Console(width=160).print(shown(dry_run(recipe, steps)))
        return None
    output = Path(recipe.output)
    rows: list[dict[str, Any]] = []
    with alone_in(output), logging_to(output / LOG_FILE):
        if recipe.evaluate is not None:
            rows.append({"stage": "original"} | evaluated(recipe, output, recipe.model, recipe.model))
        for step in steps:
            note = carried_out(step)
            row: dict[str, Any] = {"stage": step.stage.name, "folder": step.folder.name, "seconds": note["seconds"]}
            if recipe.evaluate is not None and KINDS[step.stage.command].result(step.arguments(), step.folder):
                row |= evaluated(recipe, output, step.result(), step.key)
            rows.append(row)
            table_of(rows, output)
        Console(width=160).print(shown(cells(rows)))
    return output


def steps_of(recipe: Recipe) -> Iterator[Step]:
    """The stages with their folders, which are named after what makes them."""
    key, model = digest(recipe.model), recipe.model
    for i, stage in enumerate(recipe.stages, 1):
        key = digest([stage.command, completed(stage.command, stage.arguments), key])
        step = Step(stage, key, model, Path(recipe.output) / f"{i:02}-{stage.name}-{key[:6]}")
        yield step
        model = step.result()


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _checked(recipe: Recipe, step: Step) -> None:
    """Refuse a stage that cannot work before the first one is run."""
    try:
        args = step.arguments()
        if hasattr(args, "check"):
            args.check()
    except PrunerError as error:
        line = recipe.lines.get(("stages", recipe.stages.index(step.stage)), 1)
        raise PrunerError(f"{recipe.path}:{line}: {error}") from error


def carried_out(step: Step) -> dict[str, Any]:
    """Run a stage unless it is finished; returns what is noted of it."""
    from ..cli import COMMANDS

    if (note := done(step.folder)) is not None:
        log.info("%s: finished before (%s)", step.stage.name, step.folder)
        return note
    log.info("%s: %s", step.stage.name, step.stage.command)
    start = time.perf_counter()
    args = step.arguments()
    COMMANDS[step.stage.command][1](args)
    note = {
        "command": step.stage.command,
        "arguments": dict(step.stage.arguments),
        "model": step.model,
        "key": step.key,
        "seconds": round(time.perf_counter() - start, 1),
        "made_by": provenance(),
    }
    write_text(step.folder / DONE, json.dumps(note, indent=1, default=str) + "\n")
    gc.collect()
    return note


def evaluated(recipe: Recipe, output: Path, model: str, key: str) -> dict[str, Any]:
    """Measurements of a model as a row of the table; measured once, and kept."""
    given = dict(recipe.evaluate or {})
    given.pop("models", None)
    file = output / "evaluations" / f"{digest([key, given])[:16]}.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["row"])
    except (OSError, ValueError, KeyError):
        pass
    log.info("measuring %s", model)
    fields = KINDS["evaluate"].fields
    values = {name: converted(value, fields[name]) for name, value in given.items()}
    (found,) = measured(EvaluateArguments(models=[model], **({"tokens": 0} | values)))
    row: dict[str, Any] = {"parameters": found.parameters, "macs": found.macs}
    for name, result in found.perplexity.items():
        title = Path(name).stem
        row |= {f"perplexity {title}": result.perplexity, f"per byte {title}": result.per_byte}
    for task, metrics in found.tasks.items():
        row |= {f"{task} {metric}": metrics[metric] for metric in ("acc", "acc_norm") if metric in metrics}
    if found.speed:
        row |= {"prefill tokens/s": found.speed.prefill, "decode tokens/s": found.speed.decode}
    detail = asdict(found) | {"results": None}
    write_text(file, json.dumps({"row": row, "evaluation": detail, **provenance()}, indent=1, default=str) + "\n")
    gc.collect()
    return row


def cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Rows as text; a number also as its ratio to that of the first row that has it."""
    heads = list(dict.fromkeys(key for row in rows for key in row if key != "folder"))
    out = [heads]
    first = {key: next((row[key] for row in rows if row.get(key) is not None), None) for key in heads}
    for row in rows:
        line = []
        for key in heads:
            value = row.get(key)
            if value is None:
                line.append("")
            elif isinstance(value, str):
                line.append(value)
            else:
                text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if value < 1000 else f"{value:,.0f}"
                compared = key != "seconds" and row is not rows[0] and first[key]
                line.append(f"{text} ({value / first[key]:.3f})" if compared else text)
        out.append(line)
    return out


def table_of(rows: list[dict[str, Any]], output: Path) -> None:
    """Write the table as it is so far."""
    heads, *lines = cells(rows)
    markdown = ["| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *lines)]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_text(output / "results.md", "\n".join(markdown) + "\n")
    write_text(output / "results.csv", buffer.getvalue())
    write_text(output / "results.json", json.dumps(rows, indent=1) + "\n")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder.

    Raises:
        PrunerError: one is in it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise PrunerError(f"cannot write {folder}: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PrunerError(f"another process is at work in {folder}: wait for it, or give another output") from error
        yield

"""The work of one run: its stages, each done once whoever asks for it, and what is measured of them."""

from __future__ import annotations

import gc
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..commands import COMMANDS
from ..evaluation.run import measure
from ..evaluation.table import as_json, metrics_of
from ..files import digest, folder_lock, write_text
from ..logs import log
from ..provenance import provenance, versions
from .recipe import Recipe, Stage
from .stages import DONE, build_arguments, note_of, resulting_checkpoint, with_defaults
from .torchrun import Launch

EVALUATIONS, CACHE = "evaluations", "cache"


@dataclass(frozen=True)
class Step:
    """A stage of a run: what it reads, where it writes.

    Attributes:
        key: a hash of the stage, of those before it and of the model: equal for equal work.
        model: that it reads, if it reads one.
        folder: that it writes, named after the key.
    """

    stage: Stage
    key: str
    model: str
    folder: Path

    def arguments(self) -> Any:
        given = dict(self.stage.arguments)
        if self.stage.command == "prune":
            given.setdefault("score_cache", str(self.folder.parent / CACHE))
        return build_arguments(self.stage.command, given, self.model, self.folder)

    @property
    def leaves(self) -> Path | None:
        """The checkpoint that it leaves, if any."""
        return resulting_checkpoint(self.stage.command, self.arguments(), self.folder)


def steps_of(recipe: Recipe) -> list[Step]:
    """The stages with their folders."""
    key, model = digest([recipe.model, versions()]), recipe.model
    out = []
    for i, stage in enumerate(recipe.stages, 1):
        key = digest([stage.command, with_defaults(stage.command, stage.arguments), key])
        step = Step(stage, key, model, Path(recipe.output) / f"{i:02}-{stage.name}-{key[:8]}")
        out.append(step)
        model = str(step.leaves or model)
    return out


def run_step(steps: list[Step], index: int, launch: Launch) -> dict[str, Any]:
    """Run a stage unless it is finished; returns what is noted of it.

    Another process that is at the same stage is waited for. Where the weights that a stage reads were let go of, it is
    made anew first.

    Args:
        launch: the processes that train.
    """
    step = steps[index]
    with folder_lock(step.folder.parent, step.key):
        note = note_of(step.folder)
        if note is not None:
            log.info("%s: finished before (%s)", step.stage.name, step.folder)
            return note
        before = next((i for i in reversed(range(index)) if steps[i].leaves is not None), None)
        if before is not None and not any(Path(step.model).glob("*.safetensors")):
            (steps[before].folder / DONE).unlink(missing_ok=True)
            run_step(steps, before, launch)
        log.info("%s: %s", step.stage.name, step.stage.command)
        start = time.perf_counter()
        action = launch.run if step.stage.command == "recover" and launch.several else COMMANDS[step.stage.command].run
        action(step.arguments())
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


def remove_weights(step: Step) -> None:
    """Remove the weights that a stage left, checkpoints of training too; its plan and its metrics stay."""
    if step.leaves is not None:
        for checkpoint in step.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)
        for file in step.folder.rglob("*.safetensors"):
            file.unlink(missing_ok=True)


def evaluation(recipe: Recipe, model: str) -> Any:
    """What a recipe wants measured of every model."""
    return build_arguments(
        "evaluate", {"tokens": 0, **(recipe.evaluate or {})}, model, Path()
    )  # nothing is written there


def measure_model(recipe: Recipe, model: str, key: str) -> dict[str, Any]:
    """Measurements of a model as a row of a table; measured once, and kept."""
    key = digest([key, recipe.evaluate or {}])
    output = Path(recipe.output)
    file = output / EVALUATIONS / key / "evaluation.json"
    with folder_lock(output, key):
        try:
            return dict(json.loads(file.read_text(encoding="utf-8"))["row"])
        except (OSError, ValueError, KeyError):
            pass
        log.info("measuring %s", model)
        found = measure(evaluation(recipe, model))
        one = found[0]
        row: dict[str, Any] = {"parameters": one.parameters, "macs": one.macs}
        for name, result in one.perplexity.items():
            title = Path(name).stem if len({Path(n).stem for n in one.perplexity}) == len(one.perplexity) else name
            row |= {f"perplexity {title}": result.perplexity, f"per byte {title}": result.per_byte}
        for task, metrics in one.tasks.items():
            row |= {f"{task} {metric}": metrics[metric] for metric in metrics_of(found, task)}
        if one.speed:
            row |= {"prefill tokens/s": one.speed.prefill, "decode tokens/s": one.speed.decode}
        write_text(file, as_json(found, {"row": row, **provenance()}))
    gc.collect()
    return row

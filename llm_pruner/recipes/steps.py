"""The stages of one run: each is run once and cached, and its checkpoint is measured once."""

from __future__ import annotations

import gc
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..checkpoint.config import load_config
from ..checkpoint.locate import base_of, is_adapter
from ..commands import COMMANDS
from ..evaluation.evaluate import Evaluation
from ..evaluation.names import EVALUATION_FILE, error_name, members_of, metrics_of, short_names
from ..evaluation.run import measure
from ..evaluation.table import as_json
from ..files import digest, folder_lock, read_json, strict_json, write_text
from ..flags import canonical_flags
from ..inputs import InputCheck
from ..logs import log
from ..media import is_media
from ..models.tasks import OF_TOKENS, task_of_config
from ..provenance import provenance, versions
from .recipe import Recipe, Stage
from .results import STDERR
from .source import Location, Source
from .stages import DONE, build_arguments, chaining, read_record, resulting_checkpoint, with_defaults
from .torchrun import Launch

EVALUATIONS, CACHE = "evaluations", "cache"
WEIGHTS = "*.safetensors"


@dataclass(frozen=True, kw_only=True)
class Step:
    """A stage of a run: the model that it reads, and the folder that it writes.

    Attributes:
        key: hash of the stage, of those before it, of the model and of the versions: equal for equal work.
        folder: named after number, stage and key.
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
        """Checkpoint that the stage leaves, None for a command that leaves none."""
        return resulting_checkpoint(self.stage.command, self.arguments(), self.folder)


def steps_of(recipe: Recipe) -> list[Step]:
    """Return the stages of a run with their folders."""
    key, model = digest([recipe.model, versions()]), recipe.model
    steps = []
    for i, stage in enumerate(recipe.stages, 1):
        key = digest([stage.command, with_defaults(stage.command, stage.arguments), key])
        folder = Path(recipe.output) / f"{i:02}-{stage.name}-{key[:8]}"
        step = Step(stage=stage, key=key, model=model, folder=folder)
        steps.append(step)
        model = str(step.leaves or model)
    return steps


def check_steps(steps: list[Step], recipe: Recipe, check: InputCheck, note: str = "") -> None:
    """Refuse stages that cannot work, before the first one runs.

    Args:
        check: context of the checks of inputs.
        note: end of the message.

    Raises:
        PrunerError: arguments are not valid, what they name cannot be used, or a stage would have to read an adapter
            and cannot; with file and line.
    """
    adapter: Step | None = None
    check = replace(check, origin=recipe.model)
    for i, step in enumerate(steps):
        command, location = COMMANDS[step.stage.command], ("stages", i)
        rules = chaining(step.stage.command)
        with _naming_entry(step, i, recipe, note):
            arguments = step.arguments()
            command.check_arguments(_on_any_device(arguments, recipe))
        if adapter is not None and rules.reads and not rules.reads_adapter:
            problem = f"{step.stage.name} cannot read the adapter of {adapter.stage.name}: give it merge: true{note}"
            raise recipe.source.fault(location, problem)
        with _naming_entry(step, i, recipe, note):
            command.check_inputs(arguments, check)
        if rules.leaves is not None:
            adapter = step if rules.leaves_adapter(arguments) else None
            check = replace(check, task=getattr(arguments, "task", None) or check.task)


@contextmanager
def _naming_entry(step: Step, index: int, recipe: Recipe, note: str) -> Iterator[None]:
    """Put file and line before the errors of the block, and a note behind them."""
    try:
        yield
    except ValueError as error:
        command = step.stage.command
        entry = _entry_at_fault(command, str(error), ("stages", index, command), recipe.source)
        raise recipe.source.fault(entry, f"{error}{note}") from error


def _entry_at_fault(command: str, message: str, location: Location, source: Source) -> Location:
    """Return the location of the flag that an error begins with, however the recipe spells it; else of the stage."""
    flag = re.match(r"--(\w+)", message)
    canonical = canonical_flags(COMMANDS[command].arguments_class)
    spellings = [one for one, name in canonical.items() if flag and name == canonical.get(flag[1])]
    return next(((*location, one) for one in spellings if (*location, one) in source.lines), location)


def _on_any_device(arguments: Any, recipe: Recipe) -> Any:
    """Leave devices out of the check of a stage that a cluster runs: this machine may lack them."""
    if recipe.executor.kind == "slurm":
        for name in ("device", "eval_device"):
            if hasattr(arguments, name):
                setattr(arguments, name, "auto")
    return arguments


def run_step(steps: list[Step], index: int, launch: Launch, *, needs_weights: bool = False) -> dict[str, Any]:
    """Run a stage unless it is finished; return its record.

    If another process is running the stage, wait for it.

    Args:
        launch: processes that train.
        needs_weights: run a finished stage again if the weights of its checkpoint were removed.
    """
    step = steps[index]
    with folder_lock(step.folder.parent, step.key):
        record = read_record(step.folder)
        if record is not None and (not needs_weights or _has_weights(step.leaves)):
            log.info("%s: finished before (%s)", step.stage.name, step.folder)
            return record
        if record is None:
            _explain_other_versions(step)
        restore_weights(steps[:index], launch)
        log.info("%s: %s", step.stage.name, step.stage.command)
        start = time.perf_counter()
        _run_command(step, launch)
        record = _record_of(step, time.perf_counter() - start)
        write_text(step.folder / DONE, strict_json(record))
    gc.collect()
    return record


def _record_of(step: Step, seconds: float) -> dict[str, Any]:
    return {
        "command": step.stage.command,
        "arguments": dict(step.stage.arguments),
        "model": step.model,
        "key": step.key,
        "seconds": round(seconds, 1),
        "made_by": provenance(),
    }


def _run_command(step: Step, launch: Launch) -> None:
    command = step.stage.command
    run = launch.run if command == "recover" and launch.several else COMMANDS[command].run
    run(step.arguments())


def _explain_other_versions(step: Step) -> None:
    """Log why a stage runs again although its arguments are the same: versions that results depend on have changed."""
    for folder in sorted(step.folder.parent.glob(f"{step.folder.name.rpartition('-')[0]}-????????")):
        record = read_record(folder) or {}
        before = record.get("made_by", {}).get("versions", {})
        changes = [f"{name} {old} -> {versions()[name]}" for name, old in before.items() if old != versions().get(name)]
        if changes and record.get("arguments") == dict(step.stage.arguments):
            log.info("%s: %s was made with other versions (%s): run anew", step.stage.name, folder, ", ".join(changes))


def restore_weights(steps: list[Step], launch: Launch) -> None:
    """Run the last stage of ``steps`` that leaves a checkpoint again if the checkpoint's weights were removed."""
    index = next((i for i in reversed(range(len(steps))) if steps[i].leaves is not None), None)
    if index is not None and not _has_weights(steps[index].leaves):
        run_step(steps, index, launch, needs_weights=True)


def _has_weights(checkpoint: Path | None) -> bool:
    """Return True if a checkpoint has its weights, and an adapter also those of its base."""
    if checkpoint is None or not any(checkpoint.glob(WEIGHTS)):
        return False
    if not is_adapter(checkpoint):
        return True
    base = Path(base_of(checkpoint))
    return not base.is_dir() or _has_weights(base)


def remove_weights(step: Step) -> None:
    """Remove the weights that a stage left, training checkpoints included; plan and metrics stay."""
    if step.leaves is not None:
        for checkpoint in step.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)
        for file in step.folder.rglob(WEIGHTS):
            file.unlink(missing_ok=True)


def evaluation_arguments(recipe: Recipe, model: str) -> Any:
    """Return the arguments that a recipe measures a model with."""
    return build_arguments("evaluate", {"tokens": 0, **(recipe.evaluate or {})}, model, Path())


def measure_original(recipe: Recipe) -> dict[str, Any]:
    """Measure the model that a recipe starts from, once; return a row of a table."""
    return _measure(recipe, recipe.model, digest([recipe.model, versions()]), lambda: None)


def measure_step(recipe: Recipe, steps: list[Step], index: int, launch: Launch) -> dict[str, Any]:
    """Measure the checkpoint of a stage, once; return a row of a table."""
    step, before = steps[index], steps[: index + 1]
    tasks = [getattr(one.arguments(), "task", None) for one in before if one.leaves is not None]
    task = next(filter(None, reversed(tasks)), None)
    against = recipe.model if _compares_outputs(recipe, task) else None
    prepare = partial(restore_weights, before, launch)
    return _measure(recipe, str(step.leaves), step.key, prepare, against=against, task=task)


def _compares_outputs(recipe: Recipe, task: str | None) -> bool:
    """Return True if an evaluation compares outputs with the original's: those of images, sounds or no next tokens."""
    arguments = evaluation_arguments(recipe, recipe.model)
    if any(map(is_media, arguments.datasets)):
        return True
    name = base_of(recipe.model) if is_adapter(recipe.model) else recipe.model
    config = load_config(name, arguments.trust_remote_code, task=task or arguments.task)
    return bool(arguments.datasets) and task_of_config(config).name not in OF_TOKENS


def _measure(
    recipe: Recipe,
    model: str,
    model_key: str,
    prepare: Callable[[], None],
    *,
    against: str | None = None,
    task: str | None = None,
) -> dict[str, Any]:
    key = digest([model_key, recipe.evaluate or {}])
    file = Path(recipe.output) / EVALUATIONS / key / EVALUATION_FILE
    with folder_lock(Path(recipe.output), key):
        try:
            return dict(read_json(file)["row"])
        except (OSError, ValueError, KeyError):
            pass
        prepare()
        log.info("measuring %s", model)
        evaluations = measure(evaluation_arguments(recipe, model), against=against, task=task)
        row = _row_of(evaluations)
        write_text(file, as_json(evaluations, {"row": row, **provenance()}))
    gc.collect()
    return row


def _row_of(evaluations: list[Evaluation]) -> dict[str, Any]:
    evaluation = evaluations[0]
    row: dict[str, Any] = {"parameters": evaluation.parameters, "macs": evaluation.macs}
    titles = short_names(evaluation.perplexity)
    for name, result in evaluation.perplexity.items():
        row |= {f"perplexity {titles[name]}": result.perplexity, f"per byte {titles[name]}": result.byte_perplexity}
    titles = short_names(evaluation.similarity)
    for name, compared in evaluation.similarity.items():
        values = {"cosine": compared.cosine, "agreement": compared.agreement}
        row |= {f"{key} {titles[name]}": value for key, value in values.items() if value is not None}
    hidden = members_of(evaluations)
    for task, metrics in evaluation.tasks.items():
        for metric in metrics_of(evaluations, task) if task not in hidden else ():
            row[f"{task} {metric}"] = metrics[metric]
            if (error := metrics.get(error_name(metric))) is not None:
                row[f"{task} {metric}{STDERR}"] = error
    if evaluation.speed:
        row |= {"prefill tokens/s": evaluation.speed.prefill, "decode tokens/s": evaluation.speed.decode}
        row |= {"weight bytes": evaluation.weight_bytes}
        titles = short_names(evaluation.perplexity)
        row |= {f"seconds {titles[name]}": result.seconds for name, result in evaluation.perplexity.items()}
    return row

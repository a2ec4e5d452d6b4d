"""Read the folders of runs, whichever command wrote them, into one form."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.locate import PLAN_FILE
from ..errors import PrunerError
from ..evaluation.generation import PROMPTS
from ..evaluation.names import EVALUATION_FILE, error_name, short_names
from ..evaluation.questions import Questions, headline
from ..files import read_json
from ..importance.scores import SCORES_FILE, Scores
from ..selection.plan import PruningPlan

PRUNED, RECOVERED, VOCABULARY = "metrics.json", "recovery.json", "vocabulary.json"
CURVES = "curves.json"
PROVENANCE = ("command", "seed", "versions", "machine")
MODEL_FLAGS = ("model", "base_model", "prune_model")  # spellings in the records of this and of older versions
STAGE_FOLDER = re.compile(r"\d+-(?P<name>.+)-[0-9a-f]{8}")  # of a stage of a recipe
LARGEST_LOSS = 700  # exp of more overflows


@dataclass(frozen=True, kw_only=True)
class MeasuredModel:
    """A model and its measurements; every number may be missing.

    Attributes:
        model: folder, alias or hub id, as the run names it.
        stage: ``original``, ``pruned``, ``recovered``, ``vocabulary``, or ``evaluated`` in a run that compared models.
        parent: model that it was made from.
        arguments: flags of the run that made it.
        macs: multiply-accumulates of a forward pass over the tokens that the run states.
        speeds: tokens per second by what was timed, since only equal work compares.
        perplexity: by text and protocol, since only equal protocols compare.
        byte_perplexity: the same per byte.
        kl: divergence from another model by text: value, standard error, and that model.
        questions: results of single questions by task.
        generation: properties of the continuations of prompts.
        accuracy: mean over the tasks, normalised by length for tasks that define it.
        accuracy_error: its standard error.
        name, method, size, seed: filled in where models of several runs are brought together.
    """

    model: str
    stage: str
    parent: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    macs: int | None = None
    weight_bytes: int | None = None
    speeds: dict[str, float] = field(default_factory=dict)
    perplexity: dict[str, float] = field(default_factory=dict)
    byte_perplexity: dict[str, float] = field(default_factory=dict)
    kl: dict[str, tuple[float, float | None, str]] = field(default_factory=dict)
    questions: dict[str, Questions] = field(default_factory=dict)
    generation: dict[str, float] = field(default_factory=dict)
    accuracy: float | None = None
    accuracy_error: float | None = None
    name: str = ""
    method: str = ""
    size: str = ""
    seed: int | None = None

    def byte_losses(self) -> dict[str, float]:
        """Return the loss per byte in nats, by text and protocol."""
        return {text: math.log(value) for text, value in self.byte_perplexity.items()}


@dataclass
class Run:
    """The folder of a run.

    Attributes:
        name: name of the folder; of a stage of a recipe that of the stage.
        models: models that the run measured.
        is_stage: a recipe named the folder, not the user.
        curves: ``{"loss": [(step, value), ...]}`` of a recovery.
        samples: continuations by prompt and model.
        about: command, seed, versions, machine.
        notes: how to read the numbers.
    """

    name: str
    folder: Path
    models: list[MeasuredModel] = field(default_factory=list)
    plan: PruningPlan | None = None
    scores: Scores | None = None
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    samples: dict[str, dict[str, str]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    is_stage: bool = False


def folders_of(path: str | Path) -> list[Path]:
    """Return the runs in the output folder of a recipe, stages first; a folder without any stands for itself."""
    path = Path(path)
    if not (path / "evaluations").is_dir():
        return [path]
    folders = [*sorted(path.glob("[0-9]*-*")), *sorted((path / "evaluations").iterdir())]
    return [folder for folder in folders if any((folder / name).is_file() for name in _READERS)] or [path]


def read(folder: str | Path) -> Run:
    """Read the folder of a run of ``prune``, ``recover``, ``vocab`` or ``evaluate --output``.

    Raises:
        PrunerError: the folder does not exist, holds no run, or holds a damaged one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PrunerError(f"there is no folder {folder}")
    full_name = folder.resolve().name
    stage = STAGE_FOLDER.fullmatch(full_name)
    run = Run(stage["name"] if stage else full_name, folder, is_stage=stage is not None)
    present = [name for name in _READERS if (folder / name).is_file()]
    if not present and (folder.resolve().parent / RECOVERED).is_file():  # the merged model of a recovery
        return read(folder.resolve().parent)
    if not present:
        raise PrunerError(f"{folder} holds no run: give a folder with one of {', '.join(_READERS)}")
    for name in present:
        content = read_json(folder / name)
        try:
            _READERS[name](run, content)
            run.about |= {key: content[key] for key in PROVENANCE if key in content}
        except PrunerError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PrunerError(f"{folder / name} is damaged: {type(error).__name__} {error}") from error
    return run


def _source_of(content: Mapping[str, Any]) -> str:
    """Return the model that a run began with."""
    return str(next(content["arguments"][flag] for flag in MODEL_FLAGS if flag in content["arguments"]))


def _read_pruning(run: Run, metrics: dict[str, Any]) -> None:
    original = _source_of(metrics)
    latency = metrics.get("latency", {})
    for name, stage, key in ((original, "original", "before"), (str(run.folder), "pruned", "after")):
        measured = metrics[key]
        speeds = {}
        if latency.get(f"{key}_us") and "tokens" in latency:
            tokens = latency["batch"] * latency["tokens"]
            speeds[_reading(latency["batch"], latency["tokens"])] = 1e6 * tokens / latency[f"{key}_us"]
        model = MeasuredModel(
            model=name,
            stage=stage,
            parent=original if stage == "pruned" else "",
            arguments=metrics["arguments"] if stage == "pruned" else {},
            parameters=int(metrics[f"parameters_{key}"]),
            speeds=speeds,
            perplexity=_perplexities(measured["perplexity"]),
        )
        run.models.append(model)
        for i, sample in enumerate(measured.get("samples", ())):
            run.samples.setdefault(PROMPTS[i] if i < len(PROMPTS) else f"prompt {i + 1}", {})[stage] = sample
    if (run.folder / PLAN_FILE).is_file():
        run.plan = PruningPlan.load(run.folder / PLAN_FILE)
    if (run.folder / SCORES_FILE).is_file():
        run.scores = Scores.load(run.folder / SCORES_FILE)


def _read_vocabulary(run: Run, metrics: dict[str, Any]) -> None:
    original = _source_of(metrics)
    run.models.append(MeasuredModel(model=original, stage="original", parameters=metrics["parameters_before"]))
    run.models.append(
        MeasuredModel(
            model=str(run.folder),
            stage="vocabulary",
            parent=original,
            arguments=metrics["arguments"],
            parameters=metrics["parameters_after"],
        )
    )
    run.notes.append(f"vocabulary: {metrics['tokens_after']:,} of {metrics['tokens_before']:,} tokens kept")


def _read_recovery(run: Run, metrics: dict[str, Any]) -> None:
    last_losses = {name: losses[1] for name, losses in metrics["losses"].items() if losses[1] is not None}
    texts = {
        name: protocol | {"perplexity": math.exp(min(last_losses[name], LARGEST_LOSS))}
        for name, protocol in metrics.get("texts", {}).items()
        if name in last_losses
    }
    arguments = metrics.get("arguments", {})
    run.models.append(
        MeasuredModel(
            model=str(run.folder),
            stage="recovered",
            parent=_source_of(metrics) if arguments else "",
            arguments=arguments | {"method": metrics["method"]},
            parameters=metrics.get("parameters"),
            perplexity=_perplexities(texts),
        )
    )
    run.notes.append(f"{metrics['method']}: {metrics['steps']} steps, {metrics['tokens']:,} tokens")
    if (run.folder / CURVES).is_file():
        content = read_json(run.folder / CURVES)
        run.curves = {name: [(float(x), float(y)) for x, y in points] for name, points in content.items()}


def _read_evaluation(run: Run, content: dict[str, Any]) -> None:
    evaluations = content["models"]
    names = short_names(evaluation["model"] for evaluation in evaluations)
    for evaluation in evaluations:
        run.models.append(_evaluated_model(evaluation, evaluations[0]["model"]))
        for prompt, continuation in evaluation.get("samples", {}).items():
            run.samples.setdefault(prompt, {})[names[evaluation["model"]]] = continuation
    first = evaluations[0]
    if first["tasks"]:
        run.notes.append("accuracy is the mean of " + ", ".join(_tasks_of(first)))
    for task, questions in run.models[0].questions.items():
        if len(questions.ids) < questions.total:
            run.notes.append(f"{task}: the first {len(questions.ids):,} of {questions.total:,} questions (--limit)")
    if (quality := first.get("generation")) is not None:
        run.notes.append(
            "samples: {prompts} greedy continuations of at most {new_tokens} tokens; repeats: share of their 4-grams "
            "that are in the same text before".format(**quality)
        )
    if first["speed"]:
        run.notes.append("compute and speed of reading at {batch} x {tokens} tokens".format(**first["speed"]))
    if len({evaluation["tokenizer"] for evaluation in evaluations}) > 1:
        run.notes.append("the models have different tokenizers: their perplexities do not compare")


_READERS = {
    PRUNED: _read_pruning,
    RECOVERED: _read_recovery,
    VOCABULARY: _read_vocabulary,
    EVALUATION_FILE: _read_evaluation,
}


def _evaluated_model(evaluation: Mapping[str, Any], first: str) -> MeasuredModel:
    speed = evaluation["speed"] or {}
    speeds = {}
    if speed.get("prefill"):
        speeds[_reading(speed["batch"], speed["tokens"])] = speed["prefill"]
    if speed.get("decode"):
        speeds[f"writing {speed['batch']} x {speed['new_tokens']}"] = speed["decode"]
    engine = evaluation.get("engine") or {}
    for batch, value in engine.get("tokens_per_second", {}).items():
        speeds[f"{engine['engine']}, writing {batch} at once"] = value
    questions = {task: Questions.decode(record) for task, record in evaluation.get("questions", {}).items()}
    tasks = [evaluation["tasks"][task] for task in _tasks_of(evaluation)]
    scored = [(task, metric) for task in tasks if (metric := headline(task)) is not None]
    accuracies = [task[metric] for task, metric in scored]
    errors = [task.get(error_name(metric)) for task, metric in scored]
    known = [error for error in errors if error is not None]
    return MeasuredModel(
        model=evaluation["model"],
        stage="evaluated",
        parameters=evaluation["parameters"],
        macs=evaluation["macs"],
        weight_bytes=evaluation.get("weight_bytes"),
        speeds=speeds,
        perplexity=_perplexities(evaluation["perplexity"]),
        byte_perplexity=_perplexities(evaluation["perplexity"], "byte_perplexity"),
        kl={text: (one["kl"], one["error"], first) for text, one in evaluation.get("divergence", {}).items()},
        questions=questions,
        generation=evaluation.get("generation") or {},
        accuracy=sum(accuracies) / len(accuracies) if accuracies else None,
        accuracy_error=math.hypot(*known) / len(known) if known and len(known) == len(errors) else None,
    )


def _tasks_of(evaluation: Mapping[str, Any]) -> list[str]:
    """Return the tasks of an evaluation, those within a group of tasks left out."""
    members = {name for record in evaluation.get("questions", {}).values() for name in record["members"]}
    return [task for task in evaluation["tasks"] if task not in members]


def _reading(batch: int, tokens: int) -> str:
    return f"reading {batch} x {tokens}"


def _perplexities(results: Mapping[str, Mapping[str, Any]], quantity: str = "perplexity") -> dict[str, float]:
    """Return perplexities by text and protocol: ``{"wikitext2, 32,768 tokens in 128s": 12.6}``."""
    perplexities = {}
    for text, result in results.items():
        overlap = "" if result.get("stride") in (None, result["seq_len"]) else f", stride {result['stride']}"
        (name,) = short_names([text]).values()
        if result.get(quantity) is not None:
            protocol = f"{name}, {result['tokens']:,} tokens in {result['seq_len']}s{overlap}"
            perplexities[protocol] = float(result[quantity])
    return perplexities

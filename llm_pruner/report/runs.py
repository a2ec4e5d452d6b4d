"""Read the folders of runs into one form, whichever command wrote them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.locate import PLAN_FILE
from ..errors import PrunerError
from ..importance.scores import SCORES_FILE, Scores
from ..selection.plan import PruningPlan

PRUNED, RECOVERED, EVALUATED, CURVES = "metrics.json", "recovery.json", "evaluation.json", "curves.json"
PROVENANCE = ("command", "seed", "versions", "machine")
MODEL_FLAGS = ("model", "base_model")  # spellings in the metrics of this and of older versions
LARGEST_LOSS = 700  # exp of more overflows


@dataclass(frozen=True)
class MeasuredModel:
    """A model and its measurements; every number may be missing.

    Attributes:
        stage: ``original``, ``pruned``, ``recovered``, or ``evaluated`` in a run that compared models.
        parameters: number of parameters.
        macs: multiply-accumulates of a forward pass over the tokens that the run states.
        latency: milliseconds of the same forward pass.
        perplexity: by text and protocol, since only equal protocols compare.
        accuracy: mean over the tasks, normalised by length for tasks that define it.
    """

    model: str
    stage: str
    parameters: int | None = None
    macs: int | None = None
    latency: float | None = None
    perplexity: dict[str, float] = field(default_factory=dict)
    accuracy: float | None = None


@dataclass
class Run:
    """The folder of a run.

    Attributes:
        models: models that the run measured.
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


def folders_of(path: str | Path) -> list[Path]:
    """Return the runs in the output folder of a recipe, stages first; any other folder is a single run."""
    path = Path(path)
    if not (path / "evaluations").is_dir():
        return [path]
    folders = [*sorted(path.glob("[0-9]*-*")), *sorted((path / "evaluations").iterdir())]
    return [folder for folder in folders if any((folder / name).is_file() for name in _READERS)]


def read(folder: str | Path) -> Run:
    """Read the folder of a run of ``prune``, ``recover`` or ``evaluate --output``.

    Raises:
        PrunerError: the folder does not exist, holds no run, or holds a damaged one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PrunerError(f"there is no folder {folder}")
    run = Run(folder.resolve().name, folder)
    present = [name for name in _READERS if (folder / name).is_file()]
    if not present:
        raise PrunerError(f"{folder} holds no run: give a folder with one of {', '.join(_READERS)}")
    for name in present:
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            _READERS[name](run, content)
            run.about |= {key: content[key] for key in PROVENANCE if key in content}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PrunerError(f"{folder / name} is damaged: {type(error).__name__} {error}") from error
    return run


def _read_pruning(run: Run, metrics: dict[str, Any]) -> None:
    original = next(metrics["arguments"][flag] for flag in MODEL_FLAGS if flag in metrics["arguments"])
    for name, stage, key in ((original, "original", "before"), (run.name, "pruned", "after")):
        measured = metrics[key]
        microseconds = metrics.get("latency", {}).get(f"{key}_us")
        model = MeasuredModel(
            _short_name(name),
            stage,
            parameters=int(metrics[f"parameters_{key}"]),
            latency=microseconds and microseconds / 1e3,
            perplexity=_perplexities(measured["perplexity"]),
        )
        run.models.append(model)
        for i, sample in enumerate(measured.get("samples", ()), 1):
            run.samples.setdefault(f"sample {i}", {})[stage] = sample
    if (run.folder / PLAN_FILE).is_file():
        run.plan = PruningPlan.load(run.folder / PLAN_FILE)
    if (run.folder / SCORES_FILE).is_file():
        run.scores = Scores.load(run.folder / SCORES_FILE)


def _read_recovery(run: Run, metrics: dict[str, Any]) -> None:
    last_losses = {name: losses[1] for name, losses in metrics["losses"].items() if losses[1] is not None}
    texts = {
        name: protocol | {"perplexity": math.exp(min(last_losses[name], LARGEST_LOSS))}
        for name, protocol in metrics.get("texts", {}).items()
        if name in last_losses
    }
    model = MeasuredModel(run.name, "recovered", metrics.get("parameters"), perplexity=_perplexities(texts))
    run.models.append(model)
    run.notes.append(f"{metrics['method']}: {metrics['steps']} steps, {metrics['tokens']:,} tokens")
    if (run.folder / CURVES).is_file():
        content = json.loads((run.folder / CURVES).read_text(encoding="utf-8"))
        run.curves = {name: [(float(x), float(y)) for x, y in points] for name, points in content.items()}


def _read_evaluation(run: Run, content: dict[str, Any]) -> None:
    evaluations = content["models"]
    names = [_short_name(evaluation["model"]) for evaluation in evaluations]
    for evaluation, short in zip(evaluations, names, strict=True):
        name = short if names.count(short) == 1 else evaluation["model"]
        run.models.append(_evaluated_model(name, evaluation))
        for prompt, continuation in evaluation.get("samples", {}).items():
            run.samples.setdefault(prompt, {})[name] = continuation
    first = evaluations[0]
    if first["tasks"]:
        run.notes.append("accuracy is the mean of " + ", ".join(first["tasks"]))
    if first["speed"]:
        run.notes.append("compute and latency at {batch} x {tokens} tokens".format(**first["speed"]))
    if len({evaluation["tokenizer"] for evaluation in evaluations}) > 1:
        run.notes.append("the models have different tokenizers: their perplexities do not compare")


_READERS = {PRUNED: _read_pruning, RECOVERED: _read_recovery, EVALUATED: _read_evaluation}


def _evaluated_model(name: str, evaluation: Mapping[str, Any]) -> MeasuredModel:
    speed = evaluation["speed"]
    accuracies = [task.get("acc_norm", task.get("acc")) for task in evaluation["tasks"].values()]
    accuracies = [accuracy for accuracy in accuracies if accuracy is not None]
    return MeasuredModel(
        name,
        "evaluated",
        parameters=evaluation["parameters"],
        macs=evaluation["macs"],
        latency=1e3 * speed["batch"] * speed["tokens"] / speed["prefill"] if speed else None,
        perplexity=_perplexities(evaluation["perplexity"]),
        accuracy=sum(accuracies) / len(accuracies) if accuracies else None,
    )


def _perplexities(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return perplexities by text and protocol: ``{"wikitext2, 32,768 tokens in 128s": 12.6}``."""
    perplexities = {}
    for text, result in results.items():
        overlap = "" if result.get("stride") in (None, result["seq_len"]) else f", stride {result['stride']}"
        title = f"{_short_name(text)}, {result['tokens']:,} tokens in {result['seq_len']}s{overlap}"
        perplexities[title] = float(result["perplexity"])
    return perplexities


def _short_name(name: str) -> str:
    """Return the name of a folder; of a merged adapter that of its run."""
    path = Path(name)
    return (path.parent if path.name == "merged" else path).name or name

"""What the folders of runs hold, in one form, whichever command wrote them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.locate import PLAN_FILE
from ..errors import PrunerError
from ..importance.scores import SCORES_FILE, Scores
from ..selection.plan import PruningPlan

PRUNED, RECOVERED, EVALUATED, CURVES = "metrics.json", "recovery.json", "evaluation.json", "curves.json"


@dataclass
class MeasuredModel:
    """A model and what is known of it; every number may be missing.

    Attributes:
        stage: ``original``, ``pruned``, ``recovered`` or, where a run compared models, ``evaluated``.
        latency: milliseconds of reading the sequences that its run states.
        perplexity: by text and how much of it was read, since only that compares.
        accuracy: the mean over the tasks, by length where a task has it.
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
    """A run's folder.

    Attributes:
        curves: ``{"loss": [(step, value), ...]}`` of a recovery.
        samples: what every model wrote, by prompt.
        about: command, seed, versions, machine.
        notes: how to read its numbers.
    """

    name: str
    folder: Path
    points: list[MeasuredModel] = field(default_factory=list)
    plan: PruningPlan | None = None
    scores: Scores | None = None
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    samples: dict[str, dict[str, str]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def folders_of(path: str | Path) -> list[Path]:
    """The runs in the output folder of a recipe, stages first; any other folder is one run."""
    path = Path(path)
    if not (path / "evaluations").is_dir():
        return [path]
    inside = sorted([*path.glob("[0-9]*-*"), *(path / "evaluations").iterdir()], key=lambda p: (p.parent != path, p))
    return [p for p in inside if any((p / name).is_file() for name in (PRUNED, RECOVERED, EVALUATED))]


def read(folder: str | Path) -> Run:
    """Read the folder of a run of ``prune``, ``recover`` or ``evaluate --output``.

    Raises:
        PrunerError: it holds none, or one that is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PrunerError(f"there is no folder {folder}")
    run = Run(folder.resolve().name, folder)
    readers = {PRUNED: _pruned, RECOVERED: _recovered, EVALUATED: _evaluated}
    found = [name for name in readers if (folder / name).is_file()]
    if not found:
        raise PrunerError(f"{folder} is no run: it has none of {', '.join(readers)}")
    for name in found:
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            readers[name](run, content)
            run.about |= {key: content[key] for key in ("command", "seed", "versions", "machine") if key in content}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PrunerError(f"{folder / name} is damaged: {type(error).__name__} {error}") from error
    return run


def _pruned(run: Run, metrics: dict[str, Any]) -> None:
    for stage, key in (("original", "before"), ("pruned", "after")):
        known = metrics[key]
        name = metrics["arguments"]["model"] if key == "before" else run.name
        latency = metrics.get("latency", {}).get(f"{key}_us")
        perplexity = dict(_perplexity(text, p) for text, p in known["perplexity"].items())
        run.points.append(
            MeasuredModel(
                _short(name), stage, int(metrics[f"parameters_{key}"]), None, latency and latency / 1e3, perplexity
            )
        )
        for i, sample in enumerate(known.get("samples", ())):
            run.samples.setdefault(f"sample {i + 1}", {})[stage] = sample
    if (run.folder / PLAN_FILE).is_file():
        run.plan = PruningPlan.load(run.folder / PLAN_FILE)
    if (run.folder / SCORES_FILE).is_file():
        run.scores = Scores.load(run.folder / SCORES_FILE)


def _recovered(run: Run, metrics: dict[str, Any]) -> None:
    texts = {name: told for name, told in metrics.get("texts", {}).items() if metrics["losses"][name][1] is not None}
    perplexity = dict(
        _perplexity(name, told | {"perplexity": math.exp(min(metrics["losses"][name][1], 700))})
        for name, told in texts.items()
    )
    run.points.append(MeasuredModel(run.name, "recovered", metrics.get("parameters"), perplexity=perplexity))
    run.notes.append(f"{metrics['method']}: {metrics['steps']} steps, {metrics['tokens']:,} tokens")
    if (run.folder / CURVES).is_file():
        content = json.loads((run.folder / CURVES).read_text(encoding="utf-8"))
        run.curves = {name: [(float(x), float(y)) for x, y in points] for name, points in content.items()}


def _evaluated(run: Run, content: dict[str, Any]) -> None:
    names = [_short(one["model"]) for one in content["models"]]
    for one, short in zip(content["models"], names, strict=True):
        name = short if names.count(short) == 1 else one["model"]
        speed, tasks = one["speed"], one["tasks"]
        accuracies = [t.get("acc_norm", t.get("acc")) for t in tasks.values()]
        known = [a for a in accuracies if a is not None]
        run.points.append(
            MeasuredModel(
                name,
                "evaluated",
                one["parameters"],
                one["macs"],
                1e3 * speed["batch"] * speed["tokens"] / speed["prefill"] if speed else None,
                dict(_perplexity(text, p) for text, p in one["perplexity"].items()),
                sum(known) / len(known) if known else None,
            )
        )
        for prompt, written in one.get("samples", {}).items():
            run.samples.setdefault(prompt, {})[name] = written
    first = content["models"][0]
    if first["tasks"]:
        run.notes.append("accuracy is the mean of " + ", ".join(first["tasks"]))
    if first["speed"]:
        run.notes.append("compute and latency at {batch} x {tokens} tokens".format(**first["speed"]))
    if len({one["tokenizer"] for one in content["models"]}) > 1:
        run.notes.append("the models have different tokenizers: their perplexities do not compare")


def _perplexity(text: str, found: dict[str, Any]) -> tuple[str, float]:
    overlap = "" if found.get("stride") in (None, found["seq_len"]) else f", stride {found['stride']}"
    return f"{_short(text)}, {found['tokens']:,} tokens in {found['seq_len']}s{overlap}", float(found["perplexity"])


def _short(name: str) -> str:
    """The name of a folder, or of the run whose merged adapter it is."""
    path = Path(name)
    return (path.parent if path.name == "merged" else path).name or name

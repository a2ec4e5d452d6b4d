"""Short names of models, texts and tasks in tables, and the names of the files that hold these."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .questions import is_accuracy

if TYPE_CHECKING:
    from .evaluate import Evaluation


EVALUATION_FILE = "evaluation.json"
TABLE_FILES = ("table.csv", "table.md", "table.tex")


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Return each model's or text's shortest name: the last parts of its path that tell it from the others.

    >>> short_names(["smollm2-135m", "prune_log/a", "tune_log/a/merged"])
    {'smollm2-135m': 'smollm2-135m', 'prune_log/a': 'prune_log/a', 'tune_log/a/merged': 'tune_log/a'}
    >>> short_names(["/data/news.txt", "wikitext2"])
    {'/data/news.txt': 'news', 'wikitext2': 'wikitext2'}
    """
    parts = {}
    for name in names:
        path = Path(name)
        path = path.parent if path.name == "merged" and path.parent.name else path
        parts[name] = (*path.parts[:-1], path.stem if path.suffix in (".txt", ".json", ".jsonl") else path.name)
    shorts = {name: path[-1] if path else name for name, path in parts.items()}
    for count in range(2, 1 + max(map(len, parts.values()), default=1)):
        taken = list(shorts.values())
        shorts = {n: "/".join(parts[n][-count:]) if taken.count(short) > 1 else short for n, short in shorts.items()}
    if len(set(shorts.values())) == len(shorts):
        return shorts
    return {name: name for name in parts}


def metrics_of(evaluations: list[Evaluation], task: str) -> list[str]:
    """Return the metrics of a task, accuracies first, without standard errors."""
    names = dict.fromkeys(name for one in evaluations for name in one.tasks.get(task, {}) if "stderr" not in name)
    return sorted(names, key=lambda name: not is_accuracy(name))


def error_name(metric: str) -> str:
    """Return the name of a metric's standard error, as lm-eval gives it.

    >>> error_name("acc"), error_name("exact_match,strict-match")
    ('acc_stderr', 'exact_match_stderr,strict-match')
    """
    name, comma, filtered = metric.partition(",")
    return f"{name}_stderr{comma}{filtered}"


def members_of(evaluations: Iterable[Evaluation]) -> set[str]:
    """Return the tasks that count within a group of tasks only."""
    return {name for one in evaluations for questions in one.questions.values() for name in questions.members}


def row_names(models: Sequence[str]) -> list[str]:
    """Return short names of models; a model that is measured twice keeps its name twice."""
    shorts = short_names(models)
    return [shorts[model] for model in models]

"""Measure accuracy on tasks with lm-eval."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import PrunerError
from ..optional import require

# Tasks of LLM-Pruner's table 1.
PAPER_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


@dataclass(frozen=True)
class ZeroShot:
    """Results of lm-eval.

    Attributes:
        tasks: metrics of every task: ``{"piqa": {"acc": 0.68, "acc_stderr": 0.01, "acc_norm": ...}}``.
        results: lm-eval's own record.
    """

    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Iterable[str] = PAPER_TASKS,
    *,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 8,
) -> ZeroShot:
    """Evaluate a model in memory, whatever its widths.

    Args:
        tasks: names of lm-eval's tasks, or of those in ``include_path``.
        include_path: folder with task files of your own.
        limit: use only the first documents of each task.
        num_fewshot: worked examples before each question; None: the task's own number, 0: as in the paper.
        batch_size: requests per forward pass, or ``auto``.

    Raises:
        PrunerError: lm-eval is not installed, a task is unknown, or its data cannot be had.
    """
    require("lm_eval", "eval", "tasks need")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tasks = list(tasks)
    with _errors_only("lm_eval"):
        manager = _task_manager(include_path)
        _check_tasks(tasks, manager)
        backend = "seq2seq" if model.config.is_encoder_decoder else "causal"
        subject = HFLM(pretrained=model, tokenizer=tokenizer, backend=backend, batch_size=batch_size)  # type: ignore[arg-type]
        try:
            record = simple_evaluate(
                subject,
                tasks=tasks,  # type: ignore[arg-type]
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                bootstrap_iters=0,
                log_samples=False,
            )
        except (OSError, ConnectionError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise PrunerError(
                f"the data of {', '.join(tasks)} cannot be had ({type(error).__name__}: {reason}); with no network, "
                "describe a local copy in a task file and give its folder as --include_path"
            ) from error
    assert record is not None
    results: dict[str, Any] = dict(record)
    return ZeroShot({task: _metrics(values) for task, values in results["results"].items()}, results)


@cache
def _task_manager(include_path: str | None) -> Any:
    """Index lm-eval's tasks, once per process: reading its thousands of files takes 10 s and more."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


@contextmanager
def _errors_only(name: str) -> Iterator[None]:
    """Let a logger pass errors only, within the block."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_tasks(tasks: list[str], manager: Any) -> None:
    """Refuse a task that lm-eval does not have; the message names the nearest."""
    for task in tasks:
        if not manager.match_tasks([task]):
            near = difflib.get_close_matches(task, manager.all_tasks, n=3, cutoff=0.0)
            raise PrunerError(f"lm-eval has no task {task!r}; the nearest are {', '.join(near)}")


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """Return the numbers by metric; ``acc,none`` is lm-eval's name of an accuracy without a filter."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if name not in ("alias", "sample_len") and isinstance(value, (int, float))
    }

"""Accuracy on tasks, by lm-eval."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import PrunerError

# Those of LLM-Pruner's table 1.
PAPER_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


@dataclass
class ZeroShot:
    """What lm-eval found.

    Attributes:
        tasks: the numbers of every task: ``{"piqa": {"acc": 0.68, "acc_stderr": 0.01, "acc_norm": ...}}``.
        results: lm-eval's own record, as it writes it.
    """

    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Iterable[str] = PAPER_TASKS,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 8,
) -> ZeroShot:
    """Evaluate a model as it lies in memory, whatever its widths.

    Args:
        tasks: names of lm-eval's tasks, or of those in ``include_path``.
        include_path: a folder with task files of one's own.
        limit: use only the first so many documents of each task.
        num_fewshot: worked examples before each question; None leaves it to the task, 0 for the paper's.
        batch_size: requests in a forward pass, or ``auto``.

    Raises:
        PrunerError: an unknown task, or one whose data cannot be had.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = list(tasks)
    known = TaskManager(include_path=include_path)
    for task in tasks:
        if not known.match_tasks([task]):
            near = difflib.get_close_matches(task, known.all_tasks, n=3, cutoff=0.0)
            raise PrunerError(f"lm-eval knows no task {task!r}; the nearest are {', '.join(near)}")
    backend = "seq2seq" if model.config.is_encoder_decoder else "causal"
    subject = HFLM(pretrained=model, tokenizer=tokenizer, backend=backend, batch_size=batch_size)  # type: ignore[arg-type]
    try:
        found = simple_evaluate(
            subject,
            tasks=tasks,  # type: ignore[arg-type]
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=known,
            bootstrap_iters=0,
            log_samples=False,
        )
    except (OSError, ConnectionError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise PrunerError(
            f"the data of {', '.join(tasks)} cannot be had ({type(error).__name__}: {why}); with no network, describe "
            "a local copy in a task file and give its folder as --include_path"
        ) from error
    assert found is not None
    results: dict[str, Any] = dict(found)
    return ZeroShot({task: _numbers(values) for task, values in results["results"].items()}, results)


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """``acc,none`` is lm-eval's name of an accuracy without a filter."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if name not in ("alias", "sample_len") and isinstance(value, (int, float))
    }

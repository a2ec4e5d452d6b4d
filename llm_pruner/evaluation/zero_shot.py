"""Measure accuracy on tasks with lm-eval."""

from __future__ import annotations

import difflib
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import PrunerError, Unavailable
from ..files import read_json
from ..optional import VLLM_ENVIRONMENT, require, require_engine

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
        PrunerError: lm-eval is not installed, a task is unknown, or its data is not available.
    """
    require("lm_eval", "eval", "tasks need")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tasks = list(tasks)
    check_tasks(tasks, include_path)
    with _errors_only("lm_eval"):
        manager = _task_manager(include_path)
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
                f"the data of {', '.join(tasks)} is not available ({type(error).__name__}: {reason}); with no network, "
                "describe a local copy in a task file and give its folder as --include_path"
            ) from error
    assert record is not None
    results: dict[str, Any] = dict(record)
    return ZeroShot({task: _metrics(values) for task, values in results["results"].items()}, results)


def zero_shot_in_vllm(
    folder: Path,
    tasks: Iterable[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> ZeroShot:
    """Measure tasks as :func:`zero_shot` does, the model run by vLLM: lm-eval's own program in a process of its own.

    Raises:
        PrunerError: vLLM is not installed or refuses the folder, or the data of a task is not available.
    """
    require_engine("vllm")
    flags = {"include_path": include_path, "limit": limit, "num_fewshot": num_fewshot}
    given = [part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "lm_eval", "--model", "vllm", "--tasks", ",".join(tasks), *given]
        command += ["--model_args", f"pretrained={folder},enforce_eager={not torch.cuda.is_available()}"]
        command += ["--output_path", output]
        run = subprocess.run(command, capture_output=True, text=True, env=VLLM_ENVIRONMENT | os.environ)
        file = next(Path(output).rglob("results*.json"), None)
        if run.returncode or file is None:
            errors = [line for line in run.stderr.splitlines() if "Error: " in line] or ["no results"]
            raise PrunerError(f"lm-eval cannot run {folder} in vLLM: {errors[-1].strip()}")
        results = read_json(file)
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


def check_tasks(tasks: Iterable[str], include_path: str | None = None) -> None:
    """Refuse a task that lm-eval's index does not have; the message names the nearest.

    Raises:
        PrunerError: a task is unknown, or ``include_path`` is no folder.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise PrunerError(f"--include_path {include_path} is not a folder: give one that holds task files")
    with _errors_only("lm_eval"):
        manager = _task_manager(include_path)
    for task in tasks:
        if not manager.match_tasks([task]):
            near = difflib.get_close_matches(task, manager.all_tasks, n=3, cutoff=0.0)
            raise PrunerError(f"lm-eval has no task {task!r}; the nearest are {', '.join(near)}")


def check_task_data(tasks: Iterable[str], include_path: str | None = None) -> None:
    """Refuse tasks whose data can neither be reached nor are cached; each data set is looked up once, not loaded.

    Raises:
        Unavailable: the data of a task is not available.
    """
    import datasets

    index = _task_manager(include_path).task_index
    configs = {str(config.get("dataset_path")): (task, config) for task, config in _task_configs(tasks, index)}
    for path, (task, config) in configs.items():
        if path == "None":  # a task in Python brings its data
            continue
        try:
            with _errors_only("datasets"):
                datasets.load_dataset_builder(path, config.get("dataset_name"), **(config.get("dataset_kwargs") or {}))
        except Exception as error:  # the loaders of a dozen formats, and the network
            reason = " ".join(str(error).split())[:200]
            raise Unavailable(
                f"the data of {task} is not available ({type(error).__name__}: {reason}); with no network, describe a "
                "local copy in a task file and give its folder as --include_path"
            ) from error


def _task_configs(names: Iterable[Any], index: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the tasks of lm-eval's index that names of tasks, groups and tags stand for, with their configs.

    The index is that of lm-eval 0.4.13.
    """
    for name in names:
        if isinstance(name, dict):  # a member of a group with values of its own
            name = name.get("task")
            if not isinstance(name, str):
                yield from _task_configs(name or (), index)
                continue
        entry = index.get(name)
        config = (entry and entry.cfg) or {}
        if "group" in config:
            members = config.get("task") or ()
            yield from _task_configs([members] if isinstance(members, str) else members, index)
        elif config:
            yield name, config
        else:  # a tag
            yield from ((other, one.cfg) for other, one in index.items() if name in one.tags and one.cfg)


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """Return the numbers by metric; ``acc,none`` is lm-eval's name of an accuracy without a filter."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if name not in ("alias", "sample_len") and isinstance(value, (int, float))
    }

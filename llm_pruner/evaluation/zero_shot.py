"""Measure accuracy on tasks with lm-eval."""

from __future__ import annotations

import difflib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import PrunerError, Unavailable, in_one_line
from ..files import read_json
from ..logs import least_level
from ..optional import VLLM_ENVIRONMENT, require, require_engine
from .harness import language_model
from .questions import Questions, questions_of
from .task_sets import PAPER_TASKS, expand_tasks

CODE_SWITCH = "HF_ALLOW_CODE_EVAL"  # of lm-eval's metric of code, in the environment
RESAMPLES = 1000  # of lm-eval's bootstrap, for standard errors of metrics that are no means
Loaded = dict[str, tuple[Any, list[Any]]]  # by name a group of lm-eval's, None for a task, and the tasks in it


@dataclass(frozen=True)
class ZeroShot:
    """Results of lm-eval.

    Attributes:
        tasks: metrics of every task: ``{"piqa": {"acc": 0.68, "acc_stderr": 0.01, "acc_norm": ...}}``.
        results: lm-eval's own record, without single documents.
        questions: results of single questions by task; those of a group of tasks are pooled under its name.
    """

    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    questions: dict[str, Questions] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """Settings of lm-eval, passed on as they are.

    Attributes:
        apply_chat_template: put each question into the chat template of the tokenizer, worked examples as its turns.
        system_instruction: text before each question.
        gen_kwargs: settings of tasks that generate, as in ``"max_gen_toks=256"``.
        confirm_run_unsafe_code: run the code that a model writes.
    """

    apply_chat_template: bool = False
    system_instruction: str | None = None
    gen_kwargs: str | None = None
    confirm_run_unsafe_code: bool = False


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Iterable[str] = PAPER_TASKS,
    *,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | None = 8,
    prompting: Prompting | None = None,
) -> ZeroShot:
    """Evaluate a model in memory, whatever its widths.

    Args:
        tasks: names of lm-eval's tasks, of those in ``include_path``, or of :data:`~.task_sets.TASK_SETS`.
        include_path: folder with task files of your own.
        limit: use only the first documents of each task.
        num_fewshot: worked examples before each question; None: the set's or the task's own number.
        batch_size: requests per forward pass; None: as many as fit.
        prompting: chat template and settings of generation.

    Raises:
        PrunerError: lm-eval is not installed, a task is unknown, its data is not available, or it runs code and that is
            not confirmed.
    """
    require("lm_eval", "eval", "tasks need")
    from lm_eval import simple_evaluate

    prompting = prompting or Prompting()
    chosen = check_tasks(tasks, include_path, confirm_run_unsafe_code=prompting.confirm_run_unsafe_code)
    if prompting.apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise PrunerError(
            f"--apply_chat_template: the tokenizer of {model.name_or_path or type(model).__name__} has no chat "
            "template: leave it out"
        )
    with least_level("lm_eval", logging.ERROR), redirect_stdout(sys.stderr):  # stdout is for results
        groups = _load_tasks(chosen, include_path)
        subject = language_model(model, tokenizer, batch_size)
        try:
            record = simple_evaluate(
                subject,
                tasks=[group or members[0] for group, members in groups.values()],
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=_task_manager(include_path),
                bootstrap_iters=RESAMPLES,
                log_samples=True,
                **asdict(prompting),
            )
        except (OSError, ConnectionError, ValueError) as error:
            raise PrunerError(f"lm-eval cannot run {', '.join(chosen)}: {in_one_line(error)}") from error
    assert record is not None
    results: dict[str, Any] = dict(record)
    return _collect(results, groups, results.pop("samples"))


def zero_shot_in_vllm(
    folder: Path,
    tasks: Iterable[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    prompting: Prompting | None = None,
) -> ZeroShot:
    """Measure tasks as :func:`zero_shot` does, the model run by vLLM: lm-eval's own program in a process of its own.

    Raises:
        PrunerError: vLLM is not installed or refuses the folder, or the data of a task is not available.
    """
    require_engine("vllm")
    # JSON, since a comma in the folder's name would begin another argument
    arguments = json.dumps({"pretrained": str(folder), "enforce_eager": not torch.cuda.is_available()})
    flags = {"include_path": include_path, "limit": limit, "num_fewshot": num_fewshot}
    return run_lm_eval("vllm", arguments, tasks, flags=flags, prompting=prompting)


def run_lm_eval(
    backend: str,
    arguments: str,
    tasks: Iterable[str],
    *,
    flags: Mapping[str, Any],
    prompting: Prompting | None = None,
) -> ZeroShot:
    """Run lm-eval's own program in processes of its own, one for each number of worked examples; read the results.

    Args:
        backend: lm-eval's name of what runs the model, such as ``vllm`` or ``hf``.
        arguments: of the model, as ``--model_args`` takes them.
        flags: further flags; those without a value are left out.

    Raises:
        PrunerError: a task is unknown or its data not available, or the program fails.
    """
    prompting, include_path = prompting or Prompting(), flags.get("include_path")
    chosen = check_tasks(tasks, include_path, confirm_run_unsafe_code=prompting.confirm_run_unsafe_code)
    runs: dict[int | None, list[str]] = defaultdict(list)
    for task, examples in chosen.items():
        given = flags.get("num_fewshot")
        runs[examples if given is None else given].append(task)
    found = ZeroShot()
    for examples, names in runs.items():
        run = _run_program(backend, arguments, names, flags={**flags, "num_fewshot": examples}, prompting=prompting)
        found = ZeroShot(found.tasks | run.tasks, _merge(found.results, run.results), found.questions | run.questions)
    return found


def _run_program(
    backend: str, arguments: str, tasks: Sequence[str], *, flags: Mapping[str, Any], prompting: Prompting
) -> ZeroShot:
    """Run lm-eval's program once: it takes one number of worked examples for all tasks."""
    values = {**flags, "system_instruction": prompting.system_instruction, "gen_kwargs": prompting.gen_kwargs}
    given = [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]
    given += [f"--{name}" for name in ("apply_chat_template", "confirm_run_unsafe_code") if getattr(prompting, name)]
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "lm_eval", "--model", backend, "--tasks", ",".join(tasks)]
        command += ["--model_args", arguments, *given, "--log_samples", "--output_path", output]
        run = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", env=VLLM_ENVIRONMENT | os.environ
        )
        file = next(Path(output).rglob("results*.json"), None)
        if run.returncode or file is None:
            errors = [line for line in run.stderr.splitlines() if "Error: " in line] or ["no results"]
            raise PrunerError(f"lm-eval cannot run {arguments} in {backend}: {errors[-1].strip()}")
        results = read_json(file)
        with least_level("lm_eval", logging.ERROR):
            groups = _load_tasks(dict.fromkeys(tasks), flags.get("include_path"))
        samples = {
            task.task_name: [json.loads(line) for line in _sample_lines(file, task.task_name)]
            for _, members in groups.values()
            for task in members
        }
    return _collect(results, groups, samples)


def _merge(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Join the records of two runs of lm-eval with different tasks."""
    nested = {key: one[key] | value for key, value in other.items() if isinstance(value, dict) and key in one}
    return one | other | nested


def _sample_lines(results: Path, task: str) -> list[str]:
    """Return the lines of a task's single documents, in a file beside that of the results."""
    file = results.with_name(results.name.replace("results_", f"samples_{task}_")).with_suffix(".jsonl")
    return file.read_text(encoding="utf-8").split("\n")[:-1]


def _load_tasks(tasks: Mapping[str, int | None], include_path: str | None) -> Loaded:
    """Load tasks with their data: for each name a group of lm-eval's, None for a task, and the tasks in it.

    Raises:
        PrunerError: the data of a task, or a package that it needs, is not available.
    """
    loaded: Loaded = {}
    for name, examples in tasks.items():
        try:
            found = _task_manager(include_path).load([name])
        except Exception as error:  # the loaders of a dozen formats, the network, and what task files import
            raise PrunerError(_explain_load_failure(name, error)) from error
        members = list(found["tasks"].values())
        for task in members:
            if examples is not None:
                task.set_config(key="num_fewshot", value=examples)
        group = found.get("groups", {}).get(name)
        loaded |= {name: (group, members)} if group else {task.task_name: (None, [task]) for task in members}
    return loaded


def _explain_load_failure(task: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if CODE_SWITCH in text:
        return f"--tasks {task} runs code that the model writes: set {CODE_SWITCH}=1 in the environment as well"
    if isinstance(error, ImportError):
        return f"--tasks {task} needs a package that is not installed: {text[:300]}"
    return (
        f"the data of {task} is not available ({type(error).__name__}: {text[:200]}); with no network, describe a "
        "local copy in a task file and give its folder as --include_path"
    )


def _collect(results: dict[str, Any], groups: Loaded, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> ZeroShot:
    """Gather metrics and the results of single questions from a record of lm-eval."""
    tasks = {task: metrics for task, values in results["results"].items() if (metrics := _metrics(values))}
    questions = {}
    for name, (group, members) in groups.items():
        inner = [one.task_name for one in members] + [one.name for one in group.get_all_groups()] if group else []
        examples = int(results["n-shot"].get(members[0].task_name) or 0)
        found = questions_of(members, samples, examples=examples, names=inner)
        if found is not None:
            questions[name] = found
    return ZeroShot(tasks, results, questions)


@cache
def _task_manager(include_path: str | None) -> Any:
    """Index lm-eval's tasks, once per process: reading its thousands of files takes 10 s and more."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def check_tasks(
    tasks: Iterable[str], include_path: str | None = None, *, confirm_run_unsafe_code: bool = False
) -> dict[str, int | None]:
    """Return the tasks that names, sets and patterns stand for, each with its worked examples (None: its own number).

    Raises:
        PrunerError: a task is unknown (the message names the nearest), or runs code and that is not confirmed, or
            ``include_path`` is no folder.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise PrunerError(f"--include_path {include_path} is not a folder: give one that holds task files")
    with least_level("lm_eval", logging.ERROR):
        manager = _task_manager(include_path)
    chosen: dict[str, int | None] = {}
    for name, examples in expand_tasks(tasks).items():
        matching = manager.match_tasks([name])
        if not matching:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.0)
            raise PrunerError(f"lm-eval has no task {name!r}; the nearest are {', '.join(near)}")
        chosen |= dict.fromkeys(matching, examples)
    unsafe = [name for name, config in _task_configs(chosen, manager.task_index) if config.get("unsafe_code")]
    if unsafe and not confirm_run_unsafe_code:
        raise PrunerError(
            f"--tasks {unsafe[0]} runs code that the model writes, on this machine: give --confirm_run_unsafe_code"
        )
    return chosen


def check_task_data(tasks: Iterable[str], include_path: str | None = None) -> None:
    """Refuse tasks whose data can neither be reached nor are cached; each data set is looked up once, not loaded.

    Raises:
        Unavailable: the data of a task is not available.
    """
    import datasets

    index = _task_manager(include_path).task_index
    named = _task_configs(expand_tasks(tasks), index)
    configs = {str(config.get("dataset_path")): (task, config) for task, config in named}
    for path, (task, config) in configs.items():
        if path == "None":  # a task in Python brings its data
            continue
        try:
            with least_level("datasets", logging.ERROR):
                datasets.load_dataset_builder(path, config.get("dataset_name"), **(config.get("dataset_kwargs") or {}))
        except Exception as error:  # the loaders of a dozen formats, and the network
            raise Unavailable(
                f"the data of {task} is not available ({in_one_line(error)}); with no network, describe a "
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

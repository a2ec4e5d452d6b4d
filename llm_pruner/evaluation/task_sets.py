"""Sets of lm-eval's tasks by name, and the tasks that ``--tasks`` stands for."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import PrunerError

# Tasks of LLM-Pruner's table 1.
PAPER_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
# Worked examples before each question; None: the task's own number.
TASK_SETS: dict[str, dict[str, int | None]] = {
    "paper": dict.fromkeys(PAPER_TASKS),
    "openllm": {
        "mmlu": 5,
        "arc_challenge": 25,
        "hellaswag": 10,
        "winogrande": 5,
        "truthfulqa_mc2": 0,
        "gsm8k": 5,
    },
    "reasoning": {"gsm8k": None, "minerva_math500": None},
    "code": {"humaneval": None, "mbpp": None},
}


def expand_tasks(names: Iterable[str]) -> dict[str, int | None]:
    """Return the tasks of a list of tasks and sets, each with its worked examples before a question.

    >>> expand_tasks(["code", "piqa"])
    {'humaneval': None, 'mbpp': None, 'piqa': None}

    Raises:
        PrunerError: two sets ask for one task with different numbers of worked examples.
    """
    tasks: dict[str, int | None] = {}
    for name in names:
        for task, examples in TASK_SETS.get(name, {name: None}).items():
            if task in tasks and tasks[task] != examples:
                raise PrunerError(
                    f"--tasks {name}: {task} is also named with another number of worked examples; evaluate the sets "
                    "one after the other"
                )
            tasks[task] = examples
    return tasks

"""Refuse models, texts, tasks and outputs that an evaluation cannot use, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.checking import check_language_model, check_later_language_model, check_model
from ..corpora import check_text
from ..errors import PrunerError
from ..files import check_file
from ..inputs import InputCheck
from ..media import check_dataset
from .arguments import EvaluateArguments, PerplexityArguments
from .labelled import check_labelled
from .names import EVALUATION_FILE, TABLE_FILES
from .zero_shot import check_task_data, check_tasks


def check_evaluation_inputs(arguments: EvaluateArguments, check: InputCheck) -> None:
    """Refuse what ``llm-pruner evaluate`` cannot use."""
    for name in arguments.model:
        if check.skips(name):
            if arguments.tasks:
                check_later_language_model(check, "--tasks", arguments.trust_remote_code)
        else:
            with check.flag("model", name):
                config = check_model(name, arguments.trust_remote_code, tokenizer=True, task=arguments.task)
                if arguments.tasks:
                    check_language_model(config, name, "--tasks")
    for name in arguments.datasets:
        with check.flag("datasets", name):
            check_dataset(name, "test")
    for name in arguments.labelled:
        with check.flag("labelled", name):
            check_labelled(name)
    if arguments.tasks:
        with check.flag("tasks", ",".join(arguments.tasks)):
            confirmed = arguments.confirm_run_unsafe_code
            check_tasks(arguments.tasks, arguments.include_path, confirm_run_unsafe_code=confirmed)
            check_task_data(arguments.tasks, arguments.include_path)
    if arguments.output and not check.skips(arguments.output):
        with check.flag("output", arguments.output):
            _check_tables(Path(arguments.output))


def _check_tables(folder: Path) -> None:
    """Refuse a folder that cannot be written, or holds tables that another program wrote."""
    check_file(folder / EVALUATION_FILE)
    foreign = [name for name in TABLE_FILES if (folder / name).exists()]
    if foreign and not (folder / EVALUATION_FILE).exists():
        raise PrunerError(f"{folder / foreign[0]} is not from evaluate, which would replace it: give another folder")


def check_perplexity_inputs(arguments: PerplexityArguments, check: InputCheck) -> None:
    """Refuse what ``evaluate/perplexity.py`` cannot use."""
    with check.flag("model", arguments.model):
        config = check_model(arguments.model, arguments.trust_remote_code, tokenizer=True)
        check_language_model(config, arguments.model, "perplexity")
    with check.flag("dataset", arguments.dataset):
        check_text(arguments.dataset, "test")
    if arguments.output:
        with check.flag("output", arguments.output):
            check_file(arguments.output)

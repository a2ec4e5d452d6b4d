"""Commands on checkpoints: ``llm-pruner to-uniform``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ..errors import PrunerError
from ..files import complete_folder, folder_for_run, same_folder, strict_json, write_text
from ..logs import logging_to
from ..provenance import provenance
from ..selection.plan import PruningPlan
from ..surgery.uniform import to_uniform
from .arguments import UniformArguments
from .card import write_card
from .load import load
from .locate import PLAN_FILE
from .next_steps import log_next_steps
from .save import write_checkpoint

UNIFORM_FILE = "uniform.json"  # record of llm-pruner to-uniform


def write_uniform(arguments: UniformArguments) -> Path:
    """Run ``llm-pruner to-uniform``: write a stock checkpoint of one whose layers differ; print and return its folder.

    Raises:
        PrunerError: layers differ in more than widths, or the folder cannot be written.
    """
    arguments.check()
    folder = Path(arguments.output).expanduser()
    if same_folder(folder, arguments.model):
        raise PrunerError(f"{arguments.output} is the model that is read: give another --output")
    folder = folder_for_run(folder, UNIFORM_FILE, asdict(arguments), named=True)
    file = Path(arguments.model) / PLAN_FILE
    plan = PruningPlan.load(file) if file.is_file() else None
    with complete_folder(folder, owned_if="config.json") as temporary, logging_to(None):
        model, tokenizer = load(arguments.model, trust_remote_code=arguments.trust_remote_code)
        padded = to_uniform(model)
        write_checkpoint(padded, tokenizer, temporary, plan)
        if plan is not None:
            write_card(padded.config, temporary, plan, folder.name)
        write_text(temporary / UNIFORM_FILE, strict_json({"arguments": asdict(arguments), **provenance()}))
    with logging_to(None):
        log_next_steps(folder, "to-uniform", original=arguments.model, trust_remote_code=arguments.trust_remote_code)
    print(folder)
    return folder

"""Commands on checkpoints: ``llm-pruner to-uniform``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedModel

from ..errors import PrunerError
from ..files import complete_folder, folder_for_run, same_folder, strict_json, write_text
from ..logs import log, logging_to
from ..models.skeleton import parameter_count
from ..provenance import provenance
from ..selection.plan import PruningPlan
from ..surgery.uniform import to_uniform
from .arguments import UniformArguments
from .card import write_card
from .load import load
from .locate import PLAN_FILE
from .next_steps import log_next_steps
from .save import write_checkpoint

MOST_PADDING = 0.5  # of the parameters that pruning removed, which padding may add back unasked
UNIFORM_FILE = "uniform.json"  # record of llm-pruner to-uniform


def excess_padding(model: PreTrainedModel, padded: PreTrainedModel, plan: PruningPlan | None) -> str:
    """Log the parameters that padding adds; return why they are too many, "" if they are not.

    Args:
        plan: plan that removed parameters; None if it is not known.
    """
    added = parameter_count(padded) - parameter_count(model)
    removed = plan.removed_parameters if plan is not None else 0
    share = f", {added / removed:.0%} of what pruning removed" if removed else ""
    log.info("padding adds %s parameters%s", f"{added:,}", share)
    return (
        f"padding would add back {added:,} of the {removed:,} removed parameters"
        if added > MOST_PADDING * removed > 0
        else ""
    )


def write_uniform(arguments: UniformArguments) -> Path:
    """Run ``llm-pruner to-uniform``: pad a checkpoint whose layers differ to a plain one; print and return its folder.

    Raises:
        PrunerError: layers differ in more than widths, padding would add back more than half of what pruning removed
            (without --allow_padding), or the folder cannot be written.
    """
    arguments.check()
    folder = Path(arguments.output)
    if same_folder(folder, arguments.model):
        raise PrunerError(f"{arguments.output} is the model that is read: give another --output")
    folder = folder_for_run(folder, UNIFORM_FILE, asdict(arguments), named=True)
    file = Path(arguments.model) / PLAN_FILE
    plan = PruningPlan.load(file) if file.is_file() else None
    with complete_folder(folder, owned_if="config.json") as temporary, logging_to(None):
        model, tokenizer = load(arguments.model, trust_remote_code=arguments.trust_remote_code)
        padded = to_uniform(model)
        if (reason := excess_padding(model, padded, plan)) and not arguments.allow_padding:
            raise PrunerError(f"{reason}: prune with --uniform, serve the folder as it is, or add --allow_padding")
        write_checkpoint(padded, tokenizer, temporary, plan)
        if plan is not None:
            write_card(padded.config, temporary, plan, folder.name)
        write_text(temporary / UNIFORM_FILE, strict_json({"arguments": asdict(arguments), **provenance()}))
    with logging_to(None):
        log_next_steps(folder, "to-uniform", original=arguments.model, trust_remote_code=arguments.trust_remote_code)
    print(folder)
    return folder

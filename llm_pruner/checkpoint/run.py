"""Commands on checkpoints: ``llm-pruner to-uniform``."""

from __future__ import annotations

from pathlib import Path

from ..errors import PrunerError
from ..files import same_folder
from ..selection.plan import PruningPlan
from ..surgery.uniform import to_uniform
from .arguments import UniformArguments
from .load import load
from .locate import PLAN_FILE
from .save import save


def write_uniform(arguments: UniformArguments) -> Path:
    """Run ``llm-pruner to-uniform``: write a stock checkpoint of one whose layers differ; print and return its folder.

    Raises:
        PrunerError: layers differ in more than widths, or the folder cannot be written.
    """
    arguments.check()
    if same_folder(arguments.output, arguments.model):
        raise PrunerError(f"{arguments.output} is the model that is read: give another --output")
    model, tokenizer = load(arguments.model, trust_remote_code=arguments.trust_remote_code)
    plan = Path(arguments.model) / PLAN_FILE
    kept = PruningPlan.load(plan) if plan.is_file() else None
    folder = save(to_uniform(model), tokenizer, arguments.output, kept)
    print(folder)
    return folder

"""Apply a plan to a checkpoint: the run behind ``llm-pruner apply``."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.apply_files import apply_to_files
from ..checkpoint.arguments import ApplyArguments
from ..checkpoint.integrity import check
from ..selection.plan import PruningPlan


def apply_plan(arguments: ApplyArguments) -> Path:
    """Run ``llm-pruner apply``: cut the files of a checkpoint by a plan; print and return the new folder.

    Raises:
        PrunerError: the plan is for another model, or a file is missing or damaged.
    """
    arguments.check()
    plan = PruningPlan.load(arguments.plan, arguments.verify)
    folder = apply_to_files(plan, arguments.model, arguments.output, arguments.trust_remote_code, arguments.standalone)
    if arguments.verify:
        check(folder, arguments.trust_remote_code)
    print(folder)
    return folder

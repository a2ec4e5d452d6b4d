"""Refuse runs and outputs that a report cannot use, before anything is drawn."""

from __future__ import annotations

from pathlib import Path

from ..files import check_file
from ..inputs import InputCheck
from .arguments import ReportArguments
from .runs import folders_of, read


def check_report_inputs(arguments: ReportArguments, check: InputCheck) -> None:
    """Refuse what ``llm-pruner report`` cannot use; as a stage of a recipe it finds its runs later."""
    if check.written_later is None:
        for path in arguments.runs:
            with check.flag("runs", path):
                for folder in folders_of(path):
                    read(folder)
    if not check.skips(arguments.output):
        with check.flag("output", arguments.output):
            check_file(arguments.output)
    if arguments.figures:
        with check.flag("figures", arguments.figures):
            check_file(Path(arguments.figures) / "figure.svg")

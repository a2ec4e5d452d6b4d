"""Flags of ``llm-pruner report``."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import PrunerError
from ..flags import Arguments, flag
from ..optional import require

DEFAULT_OUTPUT = "report.html"


@dataclass(kw_only=True)
class ReportArguments(Arguments):
    """Flags of ``llm-pruner report``."""

    runs: list[str] = flag([], "folders that prune, recover, vocab, run or evaluate --output wrote")
    output: str = flag(DEFAULT_OUTPUT, "HTML page to write, one file that needs no network")
    figures: str | None = flag(None, "folder to write every figure to as well, as SVG, PNG and PDF")
    title: str = flag("Pruning report", "title of the page")

    def check(self) -> None:
        """Refuse an empty list of runs.

        Raises:
            PrunerError: no run is named, or matplotlib is not installed.
        """
        if not self.runs:
            raise PrunerError("name at least one run: llm-pruner report FOLDER [FOLDER ...]")
        require("matplotlib", "report", "figures need")

"""Flags of ``llm-pruner run``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import PrunerError
from ..flags import Arguments, flag

ExecutorKind = Literal["local", "slurm", "submitit"]


@dataclass(kw_only=True)
class RunArguments(Arguments):
    """Flags of ``llm-pruner run``."""

    recipe: str = flag("", "recipe to run: a YAML file, or the name of one that comes with llm-pruner (smollm2_demo)")
    model: str | None = flag(None, "model to use instead of the recipe's")
    output: str | None = flag(None, "folder to write to instead of the recipe's")
    dry_run: bool = flag(False, "predict shapes and sizes after every stage, without reading weights")
    status: bool = flag(False, "show the progress of the recipe's stages or sweep, without running anything")
    executor: ExecutorKind | None = flag(None, "where to run a sweep, instead of the recipe's executor")
    yes: bool = flag(False, "start a sweep of more than 200 runs without asking")
    quiet: bool = flag(False, "show no progress and no log, only results, warnings and errors")
    worker: bool = flag(False, "internal: process unclaimed sweep points")

    def check(self) -> None:
        """Refuse an empty recipe name.

        Raises:
            PrunerError: no recipe is named.
        """
        if not self.recipe:
            raise PrunerError("name a recipe: llm-pruner run RECIPE.yaml, or llm-pruner run smollm2_demo")

"""Refit a pruned model with calibration data and no labels.

The room can be called: ``lp.refit(...)`` is :func:`llm_pruner.refit.methods.refit`.
"""

import sys
from types import ModuleType
from typing import Any

from .methods import refit


class _CallableRoom(ModuleType):
    """A package that stands for its main function, whose name it has."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return refit(*args, **options)


sys.modules[__name__].__class__ = _CallableRoom

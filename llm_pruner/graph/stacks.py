"""Where the layers of a model are."""

from __future__ import annotations

import re
from typing import Any

import torch

from ..heterogeneous import layer_lists

__all__ = ["Layers", "given", "layer_lists", "passed"]


class Layers:
    """Maps a parameter name to ``(path of the layer list, index)``."""

    def __init__(self, paths: list[str]):
        self.paths = paths

    def __call__(self, name: str) -> tuple[str, int] | None:
        for path in self.paths:
            if match := re.match(rf"{re.escape(path)}\.(\d+)\.", name):
                return path, int(match[1])
        return None


def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states among the arguments that a layer is called with."""
    return args[0] if args else kwargs["hidden_states"]


def passed(output: Any) -> torch.Tensor:
    """The hidden states in what a layer returns."""
    return output[0] if isinstance(output, tuple) else output

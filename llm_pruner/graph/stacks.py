"""Where the layers of a model are."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn


class Layers:
    """Maps a parameter name to ``(path of the layer list, index)``."""

    def __init__(self, paths: list[str]):
        self.paths = paths

    def __call__(self, name: str) -> tuple[str, int] | None:
        for path in self.paths:
            if match := re.match(rf"{re.escape(path)}\.(\d+)\.", name):
                return path, int(match[1])
        return None


def layer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The stacks of decoder (or encoder) layers: outermost module lists of the model, by path.

    A list with a member that holds no parameters is no stack.
    """
    out: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        nested = any(path.startswith(f"{outer}.") for outer in out)
        if isinstance(module, nn.ModuleList) and len(module) and not nested:
            if any(next(member.parameters(), None) is None for member in module):
                continue
            out[path] = module
    return out


def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states among the arguments that a layer is called with."""
    return args[0] if args else kwargs["hidden_states"]


def passed(output: Any) -> torch.Tensor:
    """The hidden states in what a layer returns."""
    return output[0] if isinstance(output, tuple) else output

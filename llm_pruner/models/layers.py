"""Layer stacks: where the layers of a model are and what passes between them."""

from __future__ import annotations

import re
from typing import Any

import torch


class LayerLocator:
    """Maps a parameter name to ``(path of the layer list, index)``."""

    def __init__(self, paths: list[str]):
        self.paths = paths

    def __call__(self, name: str) -> tuple[str, int] | None:
        for path in self.paths:
            if match := re.match(rf"{re.escape(path)}\.(\d+)\.", name):
                return path, int(match[1])
        return None


def hidden_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states among the arguments that a layer is called with."""
    return args[0] if args else kwargs["hidden_states"]


def hidden_out(output: Any) -> torch.Tensor:
    """The hidden states in what a layer returns."""
    return output[0] if isinstance(output, tuple) else output


def is_below(path: str, name: str) -> bool:
    """Whether what is called ``name`` lies below ``path``; everything lies below the empty path."""
    return not path or name.startswith(f"{path}.")

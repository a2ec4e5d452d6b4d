"""Layer stacks: the places of a model's layers and the hidden states between them."""

from __future__ import annotations

import re
from typing import Any

import torch

HIDDEN = ("hidden_states", "hidden_state")  # names of the argument


class LayerLocator:
    """A map from parameter names to their layers: ``(path of the layer list, index)``, None outside of layers."""

    def __init__(self, paths: list[str]):
        self.paths = paths

    def __call__(self, name: str) -> tuple[str, int] | None:
        for path in self.paths:
            if match := re.match(rf"{re.escape(path)}\.(\d+)\.", name):
                return path, int(match[1])
        return None


def hidden_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the hidden states among a layer's arguments."""
    return args[0] if args else next(kwargs[name] for name in HIDDEN if name in kwargs)


def hidden_out(output: Any) -> torch.Tensor:
    """Return the hidden states in a layer's output."""
    return output[0] if isinstance(output, (tuple, list)) else output


def with_hidden(output: Any, hidden: Any) -> Any:
    """Return a layer's output with other hidden states in it.

    >>> with_hidden(("states", "weights"), "others"), with_hidden(["states"], "others"), with_hidden("states", "others")
    (('others', 'weights'), ['others'], 'others')
    """
    if isinstance(output, list):
        return [hidden, *output[1:]]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def is_below(path: str, name: str) -> bool:
    """Return True if ``name`` lies below ``path``; every name lies below the empty path."""
    return not path or name.startswith(f"{path}.")

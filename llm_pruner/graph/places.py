"""Find the place of a unit by names, and sum numbers of units by kind and layer."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import takewhile

Part = tuple[str, int | None, float]  # name of a unit, layer, number


def kind_in(name: str) -> str:
    """Return the kind of unit that a name ends with.

    >>> kind_in("model.layers.3.mlp.neurons"), kind_in("decoder.layers.0.heads.1")
    ('neurons', 'heads')
    """
    return next(part for part in reversed(name.split(".")) if not part.isdigit())


def layer_in(name: str) -> int | None:
    """Return the layer that a name says, None for a unit or module that spans layers.

    >>> layer_in("model.layers.3.mlp.neurons"), layer_in("model.hidden"), layer_in("decoder.channels.1")
    (3, None, None)
    """
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None


def stack_in(name: str) -> str:
    """Return the path of the list of layers that a name begins with, "" for a unit that spans layers.

    >>> stack_in("model.layers.3.mlp.neurons"), stack_in("decoder.block.layers"), stack_in("model.hidden")
    ('model.layers', 'decoder.block', '')
    """
    if kind_in(name) == "layers":
        return name.rpartition(".")[0]
    return name.split(f".{layer_in(name)}.")[0] if layer_in(name) is not None else ""


def common_path(names: Iterable[str]) -> str:
    """Return the path of the smallest module that holds all of these parameters."""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))


def by_layer(parts: Iterable[Part]) -> dict[str, dict[int | None, float]]:
    """Sum numbers by kind of unit and layer; kinds are told apart by stack where a model has several stacks.

    >>> by_layer([("h.0.mlp.neurons", 0, 3.0), ("h.1.mlp.neurons", 1, 2.0), ("hidden", None, 5.0)])
    {'neurons': {0: 3.0, 1: 2.0}, 'hidden': {None: 5.0}}
    >>> by_layer([("encoder.h.0.mlp.neurons", 0, 3.0), ("decoder.h.0.mlp.neurons", 0, 2.0)])
    {'neurons, encoder.h': {0: 3.0}, 'neurons, decoder.h': {0: 2.0}}
    """
    parts = list(parts)
    several = len({stack for name, _, _ in parts if (stack := stack_in(name))}) > 1
    sums: dict[str, dict[int | None, float]] = {}
    for name, layer, number in parts:
        stack = stack_in(name) if several else ""
        row = sums.setdefault(f"{kind_in(name)}, {stack}" if stack else kind_in(name), defaultdict(float))
        row[layer] += number
    return {kind: dict(row) for kind, row in sums.items()}

"""Find the attention or the MLP of a layer as a block that can be removed."""

from __future__ import annotations

from torch import nn

from ..models.per_layer import layer_lists
from .places import common_path
from .tracer import TraceError
from .units import CouplingGraph


def block_of(model: nn.Module, graph: CouplingGraph, stack: str, layer: int, *, kind: str, first: int = 0) -> str:
    """Return the path of the block of a layer that holds its units of a kind: its attention for heads, its MLP for
    neurons.

    Args:
        first: first layer that stays, whose attention has to stay too.

    Raises:
        TraceError: the layer does not exist, none of its blocks holds all units of the kind, or the block has to stay.
    """
    count = len(layer_lists(model)[stack])
    if layer >= count:
        where = stack if len(graph.of_kind("layers")) > 1 else "the model"
        raise TraceError(f"layer {layer} is out of range: {where} has layers 0 to {count - 1}")
    start = f"{stack}.{layer}."
    units = [u for u in [*graph.units, *graph.frozen] if u.kind == kind]
    names = [name for unit in units for name in unit.parameters if name.startswith(start)]
    path = common_path(names) if names else ""
    while path and isinstance(model.get_submodule(path), nn.Linear):  # a single projection is no block
        path = path.rpartition(".")[0]
    own = path.startswith(start) and not isinstance(model.get_submodule(path), nn.ModuleList)
    if not own or (kind == "heads" and layer == first):
        why = "transformers reads the length of the cache from it" if own else f"no block holds its {kind} alone"
        raise TraceError(f"the block with the {kind} of {start[:-1]} cannot be removed: {why}")
    return path

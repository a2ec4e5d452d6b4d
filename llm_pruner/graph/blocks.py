"""Find the attention or the MLP of a layer as a block that can be removed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.hooks import forward_hooks
from ..models.inputs import example_inputs, share_inputs
from ..models.layers import HIDDEN, LayerLocator, hidden_in, hidden_out, with_hidden
from ..models.per_layer import layer_lists
from ..models.running import MetaReads, forward, tracing_mode
from ..models.skeleton import skeleton
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


@torch.enable_grad()
def block_outputs(model: PreTrainedModel, path: str) -> dict[str, Any]:
    """Return how many values a block returns (``absent``, 0: no tuple), and which of its arguments, such as the
    ``position_bias`` of T5, are among them (``passes``).

    Raises:
        TraceError: its layer hands on the residual stream through the block alone, which then has to stay.
    """
    entry: dict[str, Any] = {}
    twin = skeleton(type(model), model.config)
    share_inputs(twin, model)
    place = LayerLocator(list(layer_lists(twin)))(path)
    layer = twin.get_submodule("{}.{}".format(*place)) if place else twin

    def watch(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = hidden_in(args, kwargs).detach().requires_grad_()
        name = next((name for name in HIDDEN if name in kwargs), "")
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {name: hidden})

    def note(_: nn.Module, __: Any, kwargs: dict[str, Any], output: Any) -> Any:
        values = output if isinstance(output, tuple) else ()
        names = [next((n for n, v in kwargs.items() if v is not None and v is value), None) for value in values]
        entry.update({"absent": len(values)} | ({"passes": names} if any(names) else {}))
        return with_hidden(output, hidden_out(output).detach())

    def check(_: nn.Module, __: Any, ___: Any, output: Any) -> None:
        if entry and place and not hidden_out(output).requires_grad:
            raise TraceError(f"{path} cannot be removed: the residual stream of its layer runs through it")

    twin.requires_grad_(False)
    after, before = [(twin.get_submodule(path), note), (layer, check)], [(layer, watch)] if place else []
    with tracing_mode(twin), MetaReads(), forward_hooks(after, before=before, with_kwargs=True):
        forward(twin, example_inputs(twin))
    return entry

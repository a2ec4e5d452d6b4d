"""How long a forward pass takes on the device where the model lies, and what it would take after a plan.

What a layer takes depends on its widths, and not in proportion: kernels work in tiles, and small products leave a
device idle. So layers of several widths are timed once, each kind of unit by itself, and a plan is looked up in that
table, with straight lines between its entries.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import PrunerError
from ..graph.units import CouplingGraph
from ..models.layers import LayerLocator
from ..models.per_layer import layer_lists
from ..models.running import evaluating, model_inputs, random_tokens
from ..selection.budgets import Budget
from ..selection.plan import PruningPlan
from ..surgery.apply import apply

MICROSECONDS = {"US": 1, "MS": 10**3, "S": 10**6}
SHARES = (0.2, 0.4, 0.6, 0.8)  # of a kind's indices, that are timed beside all of them
REPEATS = 5
Layer = tuple[str, int]  # path of its stack, index


def latency(model: PreTrainedModel, tokens: int = 128, batch: int = 1) -> float:
    """Microseconds of one forward pass over ``[batch, tokens]``, without a cache: the median of a few."""
    return _timed(model, tokens, batch)[0]


def latency_budget(
    model: PreTrainedModel,
    graph: CouplingGraph,
    target: float | str,
    tokens: int = 128,
    batch: int = 1,
    kinds: Iterable[str] = ("heads", "neurons"),
) -> Budget:
    """At most so much time for a forward pass over ``[batch, tokens]``: a fraction, or an amount such as ``"30ms"``.

    Args:
        model: with its weights, on the device that counts.
        kinds: of units that the plan will prune.

    Raises:
        PrunerError: units of a kind run through the whole model, so that no layer's width tells what they cost.
    """
    table = LatencyTable(model, graph, kinds, tokens, batch)
    return Budget("target_latency", target, table.predict, MICROSECONDS, "microseconds")


class LatencyTable:
    """Times of a model's layers, in microseconds.

    Attributes:
        whole: of a forward pass of the unpruned model.
        layers: of every layer in it.
        widths: of every layer and kind, ``[(share of the indices kept, time of the layer)]`` from the least share up.
    """

    def __init__(self, model: PreTrainedModel, graph: CouplingGraph, kinds: Iterable[str], tokens: int, batch: int):
        self._layer_of = LayerLocator(list(layer_lists(model)))
        self._members: dict[tuple[Layer, str], int] = defaultdict(int)
        self.widths: dict[tuple[Layer, str], list[tuple[float, float]]] = defaultdict(list)
        whole, plain = _timed(model, tokens, batch)
        alike = _alike(model)
        self.whole, self.layers = whole, _shared(plain, alike)
        for kind in kinds:
            units = graph.of_kind(kind)
            if kind == "layers" or not units:
                continue
            owners = [self._owner(unit.name) for unit in units]
            for owner in owners:
                self._members[owner, kind] += 1
            timed: list[dict[Layer, list[float]]] = []
            for share in SHARES:
                plan, kept = PruningPlan(), defaultdict(list)
                for unit, owner in zip(units, owners, strict=True):
                    steps = -(-max(unit.minimum, round(share * unit.size)) // unit.multiple)
                    count = min(steps * unit.multiple, unit.size)
                    plan.keep(unit, torch.arange(count), graph.shapes)
                    kept[owner].append(count / unit.size)
                if kept in timed:  # few heads have few shares
                    continue
                timed.append(kept)
                times = _shared(_timed(apply(model, plan), tokens, batch)[1], alike)
                for owner, shares in kept.items():
                    self.widths[owner, kind].append((statistics.mean(shares), times[owner]))
            for owner in dict.fromkeys(owners):
                # Wider is never faster: where it seems so, that is noise.
                entries, least = [(1.0, self.layers[owner])], self.layers[owner]
                for share, found in sorted(self.widths[owner, kind], reverse=True):
                    if share < entries[0][0]:
                        least = min(least, found)
                        entries.insert(0, (share, least))
                self.widths[owner, kind] = entries

    def predict(self, plan: PruningPlan) -> float:
        """Microseconds of a forward pass of the model that a plan leaves."""
        gone = {(path, i) for path, i in self.layers if path in plan.layers and i not in plan.layers[path].tolist()}
        saved = sum(self.layers[layer] for layer in gone)
        lost: dict[tuple[Layer, str], float] = defaultdict(float)  # share of a kind's indices in a layer
        for name, choice in plan.units.items():
            if choice.kind != "layers":
                key = self._owner(name), choice.kind
                lost[key] += (1 - choice.kept.numel() / choice.size) / self._members[key]
        for (layer, kind), share in lost.items():
            if layer not in gone:
                saved += self.layers[layer] - _between(self.widths[layer, kind], 1 - share)
        return max(self.whole - saved, 0.0)

    def _owner(self, unit: str) -> Layer:
        found = self._layer_of(unit)
        if found is None:
            raise PrunerError(
                f"target_latency is told from the widths of single layers, and {unit} runs through all of them: "
                "give target_macs"
            )
        return found


def _between(entries: list[tuple[float, float]], share: float) -> float:
    """The time at a share, on the straight lines through the entries, and through the first two below them."""
    if len(entries) == 1:
        return entries[0][1]
    i = next((i for i, (s, _) in enumerate(entries[1:-1], 1) if share <= s), len(entries) - 1)
    (s0, t0), (s1, t1) = entries[i - 1], entries[i]
    return max(t0 + (t1 - t0) * (share - s0) / (s1 - s0), 0.0)


def _alike(model: nn.Module) -> dict[Layer, Any]:
    """For every layer, what it shares with those that are built alike."""
    return {
        (path, i): (path, type(layer), tuple(tuple(p.shape) for p in layer.parameters()))
        for path, stack in layer_lists(model).items()
        for i, layer in enumerate(stack)
    }


def _shared(times: dict[Layer, float], alike: dict[Layer, Any]) -> dict[Layer, float]:
    """Layers that are built alike take alike: the mean of their times tells it better than each of them."""
    groups: dict[Any, list[float]] = defaultdict(list)
    for layer, found in times.items():
        groups[alike[layer]].append(found)
    return {layer: statistics.mean(groups[alike[layer]]) for layer in times}


@torch.no_grad()
def _timed(model: PreTrainedModel, tokens: int, batch: int) -> tuple[float, dict[Layer, float]]:
    """Microseconds of a forward pass, and of each layer in it: medians of a few passes, after one to warm up."""
    ids = random_tokens(model, batch, tokens)
    inputs = model_inputs(model, ids)
    # Events of the device's own clock, so that kernels queue up as they do when nobody looks.
    cuda = model.device.type == "cuda"
    marks: list[tuple[Layer | None, Any]] = []

    def mark(layer: Layer | None) -> None:
        if cuda:
            marks.append((layer, torch.cuda.Event(enable_timing=True)))
            marks[-1][1].record()
        else:
            marks.append((layer, time.perf_counter()))

    def hook(layer: Layer) -> Callable[..., None]:
        return lambda *_: mark(layer)

    handles = []
    for path, stack in layer_lists(model).items():
        for i, module in enumerate(stack):
            handles.append(module.register_forward_pre_hook(hook((path, i))))
            handles.append(module.register_forward_hook(hook((path, i))))
    wholes: list[float] = []
    layers: dict[Layer, list[float]] = defaultdict(list)
    try:
        with evaluating(model):
            for _ in range(REPEATS + 1):
                marks.clear()
                mark(None)
                model(**inputs, use_cache=False)
                mark(None)
                wholes.append(_elapsed(marks[0][1], marks[-1][1]))
                pairs = zip(marks[1:-1:2], marks[2:-1:2], strict=True)
                for (layer, start), (_, end) in pairs:
                    layers[layer].append(_elapsed(start, end))  # type: ignore[index]
    finally:
        for handle in handles:
            handle.remove()
    return statistics.median(wholes[1:]), {layer: statistics.median(times[1:]) for layer, times in layers.items()}


def _elapsed(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return (end - start) * 1e6
    end.synchronize()
    return start.elapsed_time(end) * 1e3

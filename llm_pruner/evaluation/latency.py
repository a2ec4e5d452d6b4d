"""Measure how long a forward pass takes on the model's device, and predict how long it would take after a plan.

A layer's time is not proportional to its widths: kernels work in tiles, and small products leave a device idle. So
layers are timed at several widths, one kind of unit at a time, and a plan's latency is interpolated linearly between
the entries of that table.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Timer
from transformers import PreTrainedModel

from ..errors import PrunerError
from ..graph.units import CouplingGraph, Unit
from ..models.hooks import forward_hooks
from ..models.inputs import example_inputs
from ..models.layers import LayerLocator
from ..models.per_layer import layer_lists
from ..models.running import evaluating, model_inputs, without_cache
from ..progress import track
from ..selection.budgets import MICROSECONDS, Budget
from ..selection.plan import PruningPlan
from ..surgery.apply import apply
from ..turns import in_turns

SHARES = (0.2, 0.4, 0.6, 0.8)  # of a kind's indices, timed besides all of them
LEAST_SECONDS, MOST_SECONDS = 0.05, 3.0  # of one measurement
Layer = tuple[str, int]  # path of its stack, index
TimePlan = Callable[[PruningPlan], dict[Layer, float]]  # microseconds of every layer after a plan
Curve = list[tuple[float, float]]  # (share of the indices kept, microseconds), from the least share up


@torch.no_grad()
def latency(model: PreTrainedModel, tokens: int = 128, batch: int = 1) -> float:
    """Measure one forward pass over ``[batch, tokens]`` without a cache: the median, in microseconds.

    Passes are repeated until they agree within 10%, for 3 seconds at most, with all of torch's threads. To compare
    models, measure them in turns with :func:`latencies`.
    """
    timer = _pass_timer(model, tokens, batch)
    with evaluating(model):
        return timer.adaptive_autorange(min_run_time=LEAST_SECONDS, max_run_time=MOST_SECONDS).median * 1e6


def latencies(models: Iterable[PreTrainedModel], tokens: int = 128, batch: int = 1) -> list[list[float]]:
    """Measure a forward pass of several models in turns; return the microseconds of every round by model."""
    clocks = [pass_clock(model, tokens, batch) for model in models]
    for clock in clocks:
        clock()
    return in_turns(clocks)


def pass_clock(model: PreTrainedModel, tokens: int, batch: int) -> Callable[[], float]:
    """Return a function that measures a forward pass over ``[batch, tokens]``, as one of a model's repetitions.

    The function returns the median time of the passes within 0.05 seconds, in microseconds.
    """
    timer = _pass_timer(model, tokens, batch)

    def measure() -> float:
        with torch.no_grad(), evaluating(model):
            return timer.blocked_autorange(min_run_time=LEAST_SECONDS).median * 1e6

    return measure


def _pass_timer(model: PreTrainedModel, tokens: int, batch: int) -> Timer:
    inputs = model_inputs(model, example_inputs(model, batch, tokens)) | without_cache(model)
    return Timer(
        "model(**inputs)",
        globals={"model": model, "inputs": inputs},
        num_threads=torch.get_num_threads(),
    )


def latency_budget(
    model: PreTrainedModel,
    graph: CouplingGraph,
    target: float | str,
    tokens: int = 128,
    *,
    batch: int = 1,
    kinds: Iterable[str] = ("heads", "neurons"),
) -> Budget:
    """Build a budget for the time of a forward pass over ``[batch, tokens]``.

    Args:
        model: with its weights, on the device to optimize for.
        target: fraction of the model's own time, or an amount such as ``"30ms"``.
        kinds: kinds of units that the plan will prune.

    Raises:
        PrunerError: units of a kind run through the whole model, so that no single layer's width decides their time.
    """
    table = LatencyTable(model, graph, kinds=kinds, tokens=tokens, batch=batch)
    return Budget("target_latency", target, table.predict, MICROSECONDS, "microseconds")


class LatencyTable:
    """Times of a model's layers at several widths, in microseconds.

    Attributes:
        whole: time of a forward pass of the unpruned model.
        layers: time of every layer in that pass.
        widths: curve of every layer and kind, from the least share of indices up.
    """

    def __init__(
        self, model: PreTrainedModel, graph: CouplingGraph, *, kinds: Iterable[str], tokens: int = 128, batch: int = 1
    ):
        self._locate = LayerLocator(list(layer_lists(model)))
        signatures = _signatures(model)
        self.whole, layers = time_layers(model, tokens, batch)
        self.layers = _average_alike(layers, signatures)
        self.widths: dict[tuple[Layer, str], Curve] = {}
        self._members: dict[tuple[Layer, str], int] = {}

        def time_plan(plan: PruningPlan) -> dict[Layer, float]:
            return _average_alike(time_layers(apply(model, plan), tokens, batch)[1], signatures)

        for kind in kinds:
            if kind != "layers":
                self._add_kind(kind, graph, time_plan)

    def _add_kind(self, kind: str, graph: CouplingGraph, time_plan: TimePlan) -> None:
        """Time the layers with fewer indices of one kind."""
        units: dict[Layer, list[Unit]] = defaultdict(list)
        for unit in graph.of_kind(kind):
            units[self._owner(unit.name)].append(unit)
        curves: dict[Layer, Curve] = {layer: [] for layer in units}
        timed: list[dict[Layer, float]] = []
        for share in track(SHARES if units else (), f"timing layers with fewer {kind}"):
            plan, kept = PruningPlan(), {}
            for layer, members in units.items():
                counts = [_count_kept(unit, share) for unit in members]
                for unit, count in zip(members, counts, strict=True):
                    plan.keep(unit, torch.arange(count), graph.shapes)
                kept[layer] = statistics.mean(n / unit.size for n, unit in zip(counts, members, strict=True))
            if kept in timed:  # few heads have few shares
                continue
            timed.append(kept)
            times = time_plan(plan)
            for layer, curve in curves.items():
                curve.append((kept[layer], times[layer]))
        for layer, curve in curves.items():
            self._members[layer, kind] = len(units[layer])
            self.widths[layer, kind] = _monotone(curve, self.layers[layer])

    def predict(self, plan: PruningPlan) -> float:
        """Predict the microseconds of a forward pass of the model that a plan leaves."""
        dropped = {(path, i) for path, i in self.layers if path in plan.layers and i not in plan.layers[path].tolist()}
        saved = sum(self.layers[layer] for layer in dropped)
        removed: dict[tuple[Layer, str], float] = defaultdict(float)  # share of a kind's indices in a layer
        for name, choice in plan.units.items():
            if choice.kind != "layers":
                key = self._owner(name), choice.kind
                removed[key] += (1 - choice.kept.numel() / choice.size) / self._members[key]
        for (layer, kind), share in removed.items():
            if layer not in dropped:
                saved += self.layers[layer] - _interpolate(self.widths[layer, kind], 1 - share)
        return max(self.whole - saved, 0.0)

    def _owner(self, unit: str) -> Layer:
        layer = self._locate(unit)
        if layer is None:
            raise PrunerError(
                f"target_latency is predicted from the widths of single layers, and {unit} runs through all of them: "
                "give target_macs"
            )
        return layer


def _count_kept(unit: Unit, share: float) -> int:
    """Return how many of a unit's indices to keep for a share, rounded up to whole steps."""
    steps = -(-max(unit.minimum, round(share * unit.size)) // unit.multiple)
    return min(steps * unit.multiple, unit.size)


def _monotone(measured: Curve, full: float) -> Curve:
    """Sort a curve, ending with all indices: a narrower layer that seems slower is noise."""
    curve, least = [(1.0, full)], full
    for share, microseconds in sorted(measured, reverse=True):
        if share < curve[0][0]:
            least = min(least, microseconds)
            curve.insert(0, (share, least))
    return curve


def _interpolate(curve: Curve, share: float) -> float:
    """Return the time at a share: linear between entries, extrapolated from the first two below them."""
    if len(curve) == 1:
        return curve[0][1]
    i = next((i for i, (s, _) in enumerate(curve[1:-1], 1) if share <= s), len(curve) - 1)
    (s0, t0), (s1, t1) = curve[i - 1], curve[i]
    return max(t0 + (t1 - t0) * (share - s0) / (s1 - s0), 0.0)


def _signatures(model: nn.Module) -> dict[Layer, Any]:
    """Return a signature of every layer: layers that are built alike have equal ones."""
    return {
        (path, i): (path, type(layer), tuple(tuple(p.shape) for p in layer.parameters()))
        for path, stack in layer_lists(model).items()
        for i, layer in enumerate(stack)
    }


def _average_alike(times: dict[Layer, float], signatures: dict[Layer, Any]) -> dict[Layer, float]:
    """Give layers that are built alike the mean of their times, which is less noisy than each."""
    groups: dict[Any, list[float]] = defaultdict(list)
    for layer, microseconds in times.items():
        groups[signatures[layer]].append(microseconds)
    return {layer: statistics.mean(groups[signatures[layer]]) for layer in times}


def time_layers(model: PreTrainedModel, tokens: int, batch: int) -> tuple[float, dict[Layer, float]]:
    """Measure a forward pass and every layer in it: medians, in microseconds."""
    layers = {(path, i): layer for path, stack in layer_lists(model).items() for i, layer in enumerate(stack)}
    clocks = {place: _ModuleClock(cuda=model.device.type == "cuda") for place in layers}
    stamps = [(module, clocks[place].stamp) for place, module in layers.items()]
    with forward_hooks(stamps, before=stamps):
        whole = latency(model, tokens, batch)
    return whole, {layer: clock.median() for layer, clock in clocks.items() if clock.stamps}


@dataclass
class _ModuleClock:
    """Stamps at the start and end of every pass through a module: CUDA events, so that kernels still queue up."""

    cuda: bool
    stamps: list[Any] = field(default_factory=list)

    def stamp(self, *_: Any) -> None:
        if not self.cuda:
            self.stamps.append(time.perf_counter())
            return
        self.stamps.append(torch.cuda.Event(enable_timing=True))
        self.stamps[-1].record()

    def median(self) -> float:
        """Return the median microseconds of a pass."""
        pairs = zip(self.stamps[::2], self.stamps[1::2], strict=True)
        if not self.cuda:
            return statistics.median(end - start for start, end in pairs) * 1e6
        torch.cuda.synchronize()
        return float(statistics.median(start.elapsed_time(end) for start, end in pairs)) * 1e3

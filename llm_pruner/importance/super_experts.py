"""Super experts: the few whose outputs are extremely large, and without which a model is ruined.

Language models write a few activations into the residual stream that are thousands of times larger than the others.
In a mixture, a handful of experts writes them (Unveiling Super Experts, arXiv 2507.23279, section 3.2). With a_le the
largest magnitude in the outputs of expert e of layer l over the calibration tokens, expert e of layer l is one if

    a_le > P99.5(a),   a_le > max(a) / 10,   and l is a layer with massive activations behind it:

the largest magnitude of the stream is at least 1000 times its median there (Massive Activations, arXiv 2402.17762).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import PrunerError
from ..graph.places import common_path
from ..graph.units import CouplingGraph, Unit
from ..models.blockwise import Compute, native_compute
from ..models.experts import Routing, watching
from ..models.hooks import forward_hooks
from ..models.layers import LayerLocator, hidden_out
from ..models.per_layer import layer_lists
from ..models.running import check_calibration
from .activation import run_through

PERCENTILE, SHARE_OF_LARGEST = 0.995, 0.1
MASSIVE = 1000.0  # times the median magnitude
NO_EXPERTS = "and this model has none"
MEDIAN_OF = 2**16  # magnitudes of a pass that the median is taken of


def experts_by_path(model: nn.Module, units: Iterable[Unit], refusal: str) -> dict[str, Unit]:
    """Return the units of experts by the path of the largest module that owns their stacked weights and no others.

    Args:
        refusal: message of the error.

    Raises:
        PrunerError: there is none.
    """
    ranks, found = {name: parameter.ndim for name, parameter in model.named_parameters()}, {}
    for unit in units:
        rows = {name: int((label >= 0).sum()) for (name, dim), label in unit.dims.items() if dim == 0}
        stacks = [name for name, count in rows.items() if ranks.get(name) == 3 or count > unit.size]
        if unit.kind == "experts" and stacks:
            found[_owner(common_path(stacks), ranks)] = unit
    if not found:
        raise PrunerError(refusal)
    return found


def _owner(path: str, parameters: Iterable[str]) -> str:
    """Return the path of the largest module that has the same parameters as one inside it."""
    while (outer := path.rpartition(".")[0]) and _count(outer, parameters) == _count(path, parameters):
        path = outer
    return path


def _count(path: str, parameters: Iterable[str]) -> int:
    return sum(name.startswith(f"{path}.") for name in parameters)


class ExpertPeaks:
    """Largest magnitude of each expert's outputs, and the layers with massive activations behind them.

    Attributes:
        largest: by the path of a module of experts: float64 ``[experts]``; 0 for experts that no token is routed to.
        has_run: True once a pass was watched.
    """

    def __init__(self, model: PreTrainedModel, units: Iterable[Unit]):
        self.units = experts_by_path(model, units, f"super experts are stacked experts, {NO_EXPERTS}")
        self.largest = {path: torch.zeros(unit.size).double() for path, unit in self.units.items()}
        self.has_run = False
        self._lists = layer_lists(model)
        self._massive: set[tuple[str, int]] = set()

    def add(self, path: str, routing: Routing) -> None:
        """Read the outputs of a module of experts."""
        largest = routing.output.abs().amax(-1).cpu().double()
        self.largest[path].scatter_reduce_(0, routing.expert.cpu(), largest, "amax")
        self.has_run = True

    def watching_layers(self) -> AbstractContextManager[None]:
        """Look for massive activations behind every layer, in the block."""
        layers = [(path, i, layer) for path, layers in self._lists.items() for i, layer in enumerate(layers)]
        return forward_hooks([(layer, partial(self._look_behind, (path, i))) for path, i, layer in layers])

    def _look_behind(self, place: tuple[str, int], _: nn.Module, __: Any, output: Any) -> None:
        magnitudes = hidden_out(output).detach().flatten().abs()
        median = magnitudes[:: -(-len(magnitudes) // MEDIAN_OF)].float().median()
        if magnitudes.max() >= MASSIVE * median > 0:
            self._massive.add(place)

    def super_experts(self) -> dict[str, list[int]]:
        """Return the super experts by the name of their unit, without units that have none."""
        every = torch.cat(list(self.largest.values()))
        threshold = max(torch.quantile(every, PERCENTILE).item(), SHARE_OF_LARGEST * every.max().item())
        locate, found = LayerLocator(list(self._lists)), {}
        for path, unit in self.units.items():
            above = (self.largest[path] > threshold).nonzero().flatten().tolist()
            if above and locate(f"{path}.") in self._massive:
                found[unit.name] = above
        return found


def find_super_experts(
    model: PreTrainedModel, graph: CouplingGraph, calibration: Any, *, compute: Compute | None = None
) -> dict[str, list[int]]:
    """Return the super experts of a model by the name of their unit: indices of experts.

    Args:
        model: mixture of experts, with its weights.
        graph: graph of the model, from :func:`llm_pruner.trace`.
        calibration: token ids, LongTensor ``[samples, tokens]``.
        compute: device and dtype to compute with (default: the model's).

    Raises:
        PrunerError: the model has no stack of experts, or cannot read the calibration set.
    """
    peaks = ExpertPeaks(model, graph.units)
    read_peaks(model, peaks, calibration, compute or native_compute(model))
    return peaks.super_experts()


def read_peaks(model: PreTrainedModel, peaks: ExpertPeaks, calibration: Any, compute: Compute) -> None:
    """Run the calibration set through a model for ``peaks``."""
    tokens = check_calibration(model, calibration)
    with watching(model, {path: unit.size for path, unit in peaks.units.items()}, peaks.add), peaks.watching_layers():
        run_through(model, tokens, compute, lambda _, tensor: compute.convert(tensor))

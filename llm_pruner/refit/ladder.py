"""A ladder of refits: the projections of every layer, refitted for several widths of the unit that they read.

A search over widths needs the refitted model of every candidate. The ridge regression of
:mod:`llm_pruner.refit.compensate` for a projection that reads the channels K depends on sums over all its channels
alone: with inputs x, weight W and the error e of the stream without the projection, the change of W on K is

    D_K = (H_KK + lambda P_K)^-1 (C_K - H_KK W_K),    H = sum_t v_t x_t x_t',    C = sum_t v_t x_t e_t'

So one pass over the calibration tokens, layer by layer, gives the refits of all widths. In that pass, earlier layers
have the widths of a starting point, refitted too: every rung makes up for the error that they leave there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..graph.units import CouplingGraph, Unit
from ..models.blockwise import computing, native_compute, standing_in
from ..models.inputs import Inputs
from ..models.processes import own_share
from ..models.running import evaluating
from ..progress import track
from ..selection.plan import PruningPlan
from ..surgery.equivalence import masking_modes
from ..surgery.slicing import mask
from .added import added_projections, single_stack
from .compensate import SAMPLES_PER_PASS, Targets, observe, walk_original
from .matching import MatchingStack
from .regression import RegressionSums, best_ridge
from .stream import Projection, ResidualStream

Widths = Mapping[str, int]  # kept count by unit


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A projection that reads some of its channels.

    Attributes:
        channels: channels that it reads, LongTensor.
        weight: refitted weight of these channels ``[channels, hidden]``.
        bias: refitted bias ``[hidden]``, None where it has none.
    """

    channels: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Refitted projections of a model by the width of what they read.

    Attributes:
        rungs: projections by path, and by kept count of the unit that they read; of a projection that reads no unit
            of the search, under 0.
        units: name of the unit that a projection reads.
    """

    rungs: dict[str, dict[int, Rung]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)

    def tensors(self, model: nn.Module, widths: Widths) -> dict[str, torch.Tensor]:
        """Return the refitted weights and biases for some widths, at the shapes of the unpruned ones, by name."""
        tensors: dict[str, torch.Tensor] = {}
        for path, rungs in self.rungs.items():
            tensors |= _tensors(model.get_submodule(path), path, rungs[widths.get(self.units.get(path, ""), 0)])
        return tensors


def _tensors(module: nn.Module, path: str, rung: Rung) -> dict[str, torch.Tensor]:
    """Return weight and bias of a projection, with zeros for the channels that it does not read."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    rows = rung.weight.new_zeros(weight.shape if isinstance(module, Conv1D) else weight.T.shape)
    rows[rung.channels] = rung.weight
    tensors = {f"{path}.weight": rows if isinstance(module, Conv1D) else rows.T}
    return tensors if rung.bias is None else tensors | {f"{path}.bias": rung.bias}


def _reads(model: nn.Module, name: str, dim: int) -> bool:
    """Return True if a dim of a parameter is what its module multiplies its input with."""
    module = model.get_submodule(name.rpartition(".")[0])
    inner = 0 if isinstance(module, Conv1D) else 1
    return isinstance(module, nn.Linear | Conv1D) and name.endswith(".weight") and dim == inner


def _unit_read(model: nn.Module, graph: CouplingGraph, path: str, names: Iterable[str]) -> Unit | None:
    """Return the unit, of those named, whose only reader is a projection; None if it reads none or several."""
    reading = [
        unit
        for unit in map(graph.unit, names)
        if [f"{path}.weight"] == [name for name, dim in unit.dims if _reads(model, name, dim)]
    ]
    return reading[0] if len(reading) == 1 else None


@torch.no_grad()
def build_ladder(
    model: PreTrainedModel,
    shorter: PreTrainedModel,
    graph: CouplingGraph,
    calibration: Inputs,
    *,
    rungs: Mapping[str, Mapping[int, PruningPlan]],
    start: PruningPlan,
    kept: Sequence[int] | None = None,
) -> Ladder:
    """Refit every projection whose output is added to the stream for every width of the unit that it reads.

    Args:
        model: original model.
        shorter: model whose widths are searched: the original, or what is left of it without the dropped layers.
        graph: graph of ``shorter``.
        calibration: LongTensor ``[samples, tokens]`` or other inputs.
        rungs: plan that leaves a unit a kept count, by unit and count; among them the counts of ``start``.
        start: plan whose widths earlier layers have while a layer is fitted.
        kept: indices of the original's layers that ``shorter`` has (default: all).

    Raises:
        PrunerError: the model has several stacks of layers, or its layers pass on more than one stream.
    """
    builder = _Builder(shorter, graph, rungs, start)
    (_, original), (path, layers) = single_stack(model), single_stack(shorter)
    stack = MatchingStack(path, original, layers, list(range(len(original)) if kept is None else kept))
    projections = added_projections(shorter, calibration)
    builder.find_readers([f"{path}.{i}.{one.name}" for i, added in enumerate(projections) for one in added])
    batches = [own_share(batch) for batch in calibration.split(SAMPLES_PER_PASS)]
    with evaluating(model), computing(model), ExitStack() as masked:
        before = ResidualStream(model, original, batches)
        if shorter is not model:
            masked.enter_context(evaluating(shorter))
        with builder.masked():
            after = ResidualStream(shorter, layers, batches)
        added = track(projections, "refitting layers at several widths")
        for i, targets in walk_original(before, stack, added):
            with builder.masked():
                moved = None
                for one in projections[i]:
                    moved = builder.fit(
                        after, i, projections[i], one=one, targets=targets, path=f"{path}.{i}.{one.name}"
                    )
                if moved is None:
                    after.advance(i, [])
                else:  # nothing has changed since the last projection was fitted
                    after.hidden = moved
    return builder.ladder


class _Builder:
    """Fits rungs on the residual stream of a model whose tensors others stand in for."""

    def __init__(
        self,
        model: PreTrainedModel,
        graph: CouplingGraph,
        rungs: Mapping[str, Mapping[int, PruningPlan]],
        start: PruningPlan,
    ):
        self.model, self.graph, self.rungs, self.start = model, graph, rungs, start
        self.ladder, self.compute = Ladder(), native_compute(model)
        self.fitted: dict[str, torch.Tensor] = {}  # tensors at the starting point, of layers that are fitted
        self.others = PruningPlan()

    def find_readers(self, paths: Iterable[str]) -> None:
        """Find the unit that each projection reads; units without such a projection are masked as ``start`` says."""
        for path in paths:
            if (unit := _unit_read(self.model, self.graph, path, self.rungs)) is not None:
                self.ladder.units[path] = unit.name
        for name, choice in self.start.units.items():
            if name not in self.ladder.units.values():
                self.others.keep(self.graph.unit(name), choice.kept, self.graph.shapes)

    @contextmanager
    def masked(self) -> Iterator[None]:
        """Run the model at the starting point, as far as it is fitted."""
        modes = masking_modes(self.graph, self.others)

        def stand_in(name: str, tensor: torch.Tensor) -> torch.Tensor:
            tensor = self.compute.convert(self.fitted.get(name, tensor))
            return modes.routers.stand_in(name, mask(name, tensor, self.others) if name in self.others.kept else tensor)

        with modes.routing(self.model), standing_in(self.model, stand_in):
            yield

    def fit(
        self,
        stream: ResidualStream,
        layer: int,
        added: list[Projection],
        *,
        one: Projection,
        targets: Targets,
        path: str,
    ) -> list[torch.Tensor] | None:
        """Fit a projection for every width of what it reads.

        Returns:
            The stream behind the layer, at the starting point, if the projection is added last; None if that has to be
            found by running the layer again.
        """
        module = stream.layers[layer].get_submodule(one.name)
        weight = self.compute.convert(module.weight)  # type: ignore[arg-type]
        weight = weight if isinstance(module, Conv1D) else weight.T
        if (bias := module.bias) is not None:
            weight = torch.cat([weight, self.compute.convert(bias)[None]])  # type: ignore[arg-type]
        observed = observe(stream, layer, one, added, targets=targets, without=weight)
        count, unit = len(weight) - (bias is not None), self.ladder.units.get(path)
        self.ladder.rungs[path] = {
            width: _solve(observed.fitted, observed.held_out, channels, weight, count)
            for width, channels in self._channels(path, unit, count, weight.device).items()
        }
        start = self.start.units.get(unit or "")
        width = 0 if unit is None else len(start.kept) if start is not None else self.graph.unit(unit).size
        rung = self.ladder.rungs[path][width]
        self.fitted |= _tensors(module, path, rung)
        change = -weight
        change[rung.channels] += rung.weight
        if rung.bias is not None:
            change[-1] += rung.bias
        return observed.moved(change)

    def _channels(self, path: str, unit: str | None, inputs: int, device: torch.device) -> dict[int, torch.Tensor]:
        """Return the input channels of a projection by the kept count of the unit that it reads."""
        every = torch.arange(inputs, device=device)
        if unit is None:
            return {0: every}
        kept = {count: plan.kept.get(f"{path}.weight", {}) for count, plan in self.rungs[unit].items()}
        return {count: next(iter(dims.values()), every).to(device) for count, dims in kept.items()}


def _solve(
    fitted: RegressionSums, held_out: RegressionSums, channels: torch.Tensor, weight: torch.Tensor, inputs: int
) -> Rung:
    """Return a projection that reads some channels, moved by the regression if that helps on held-out tokens."""
    every = torch.cat([channels, torch.arange(inputs, len(weight), device=channels.device)])  # with that of the bias
    rows = weight[every].float()
    one, two = fitted.restricted(every, rows), held_out.restricted(every, rows)
    best, gain = best_ridge(one, two)
    if gain > 0:
        rows = rows + (one + two).solve(best)
    rows = rows.to(weight.dtype)
    return Rung(channels=channels, weight=rows[: len(channels)], bias=rows[-1] if len(every) > len(channels) else None)

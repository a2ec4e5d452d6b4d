"""The residual stream between layers, and the projections of a layer whose output is added to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import PrunerError
from ..models.blockwise import computing, native_compute
from ..models.hooks import forward_hooks
from ..models.inputs import Inputs, ModelInputs
from ..models.layers import hidden_in, hidden_out
from ..models.per_layer import layer_lists
from ..models.running import evaluating, forward
from ..progress import track

PROBE_TOKENS = 16  # tokens on which projections are probed


class ResidualStream:
    """Hidden states of a model in front of one of its layers, batch by batch, and the arguments of its layers.

    Attributes:
        layers: the model's layers.
        hidden: hidden states of every batch, in front of the first layer at first.

    Raises:
        PrunerError: running the layers one after the other does not give the model's own output.
    """

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList, batches: list[Any]):
        self.layers = layers
        self.hidden: list[torch.Tensor] = []
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []  # by batch and layer
        for ids in track(batches, "recording the residual stream"):
            first, last = self._record(model, ids.to(native_compute(model).device))
            self.hidden.append(first)
        hidden = self.hidden[-1]
        for i in range(len(layers)):
            hidden = self.run(i, len(batches) - 1, hidden)
        if not torch.allclose(hidden.float(), last.float(), rtol=1e-3, atol=1e-4 * last.abs().max().item()):
            raise PrunerError("this model cannot be compensated: its layers pass on more than one stream")

    def _record(self, model: PreTrainedModel, ids: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a batch, record the arguments of every layer; return the stream before the first and after the last."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        ends: dict[str, torch.Tensor] = {}

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ends.setdefault("first", hidden_in(args, kwargs))
            calls.append((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))

        def record_last(_: nn.Module, __: Any, output: Any) -> None:
            ends["last"] = hidden_out(output)

        # Before all other hooks: a layer with hooks of its own is given what the model gives it.
        with (
            forward_hooks(before=[(layer, record) for layer in self.layers], with_kwargs=True, prepend=True),
            forward_hooks([(self.layers[-1], record_last)]),
        ):
            forward(model, ids)
        self._calls.append(calls)
        return ends["first"], ends["last"]

    def run(self, layer: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """Run one layer on ``hidden``, with the other arguments of that batch."""
        args, kwargs = self._calls[batch][layer]
        return hidden_out(self.layers[layer](hidden, *args, **kwargs))

    def run_noting(
        self, layer: int, batch: int, names: list[str]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Run a layer on its batch; return the input of each projection, and the stream just behind each.

        Args:
            names: added projections of the layer, in order. The stream behind the layer itself is under "".
        """
        reads: dict[str, torch.Tensor] = {}
        adds: dict[str, torch.Tensor] = {}

        def note(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
                reads[name], adds[name] = args[0], output

            return hook

        with forward_hooks([(self.layers[layer].get_submodule(name), note(name)) for name in names]):
            stream = self.run(layer, batch, self.hidden[batch])
        behind = {"": stream}
        for name in reversed(names):  # what comes later is added as it is, and can be taken away again
            behind[name] = stream
            stream = stream - adds[name].view(stream.shape)
        return reads, behind

    def advance(self, layer: int, names: list[str]) -> dict[str, list[torch.Tensor]]:
        """Move the stream behind ``layer``; return the stream behind each of its projections, batch by batch."""
        streams: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for batch in range(len(self.hidden)):
            _, behind = self.run_noting(layer, batch, names)
            self.hidden[batch] = behind[""]
            for name in names:
                streams[name].append(behind[name])
        return streams


def single_stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return path and layers of the model's only stack.

    Raises:
        PrunerError: the model has several stacks, or none.
    """
    stacks = list(layer_lists(model).items())
    if len(stacks) != 1:
        raise PrunerError(f"compensation needs one stack of layers, not {len(stacks)}")
    return stacks[0]


@torch.no_grad()
def added_projections(model: PreTrainedModel, calibration: Inputs) -> list[list[str]]:
    """Return, for every layer, its projections whose output is added to the residual stream unchanged, in order.

    Args:
        calibration: LongTensor ``[samples, tokens]``; the beginning of the first sample is used.

    Raises:
        PrunerError: the model has no single stack of layers, or these do not pass on one stream.
    """
    _, layers = single_stack(model)
    with evaluating(model), computing(model):
        sample = calibration[:1]
        short = sample if isinstance(sample, ModelInputs) else sample[:, :PROBE_TOKENS]  # it is run many times
        stream = ResidualStream(model, layers, [short])
        projections: list[list[str]] = []
        for i in track(range(len(layers)), "finding projections to compensate"):
            projections.append(_added_in_layer(stream, i))
            stream.advance(i, [])
    return projections


def _added_in_layer(stream: ResidualStream, layer: int) -> list[str]:
    """Return the added projections of a layer, in order; the last one is found first.

    A change of the last one's output changes the layer's output alike; with its output silenced, so does the one
    before it.
    """
    block = stream.layers[layer]
    names: list[str] = []

    def silence(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(output)

    while True:
        with forward_hooks([(block.get_submodule(name), silence) for name in names]):
            last = _last_added(stream, layer, names)
        if last is None:
            return names
        names.insert(0, last)


def _last_added(stream: ResidualStream, layer: int, silenced: list[str]) -> str | None:
    """Return the last linear module of a layer whose moved output moves the layer's output alike."""
    hidden = stream.hidden[0]
    plain = stream.run(layer, 0, hidden)
    moved = 0.1 * plain.abs().mean() * torch.randn(plain.shape, generator=torch.Generator().manual_seed(0)).to(plain)
    linear = [(n, m) for n, m in stream.layers[layer].named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    for name, module in reversed([(n, m) for n, m in linear if n not in silenced]):
        fits: list[bool] = []

        def move(_: nn.Module, __: Any, output: torch.Tensor, fits: list[bool] = fits) -> torch.Tensor:
            fits.append(output.numel() == plain.numel())
            return output + moved.view(output.shape) if fits[-1] else output

        with forward_hooks([(module, move)]):
            change = stream.run(layer, 0, hidden) - plain
        if fits == [True] and torch.allclose(change.float(), moved.float(), atol=0.02 * moved.abs().max().item()):
            return name
    return None

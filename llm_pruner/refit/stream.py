"""The residual stream between layers, and the projections of a layer whose output is added to it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import PrunerError
from ..models.blockwise import computing, native_compute
from ..models.experts import gated_inputs, top_k_call
from ..models.hooks import Forward, forward_hooks, replaced_forwards
from ..models.inputs import Inputs, ModelInputs
from ..models.layers import hidden_in, hidden_out
from ..models.per_layer import layer_lists
from ..models.processes import count, gathered
from ..models.running import evaluating, forward
from ..peak_memory import give_back_memory
from ..progress import track
from .mapped import mapped, mapped_space

PROBE_TOKENS = 16  # tokens on which projections are probed
IN_MEMORY = 1 << 30  # bytes of the hidden states of a calibration set that stay in memory


@dataclass(frozen=True)
class Projection:
    """A projection of a layer whose output is added to the residual stream.

    Attributes:
        name: path in the layer.
        norm: path of a norm between the projection and the stream; "" where its output is added as it is.
        norm_reads_sum: the norm reads the sum with the stream, as in BERT; else the output alone, as in Gemma 2.
    """

    name: str
    norm: str = ""
    norm_reads_sum: bool = False

    @property
    def added(self) -> str:
        """Path of the module whose output is added to the stream."""
        return self.name if self.norm_reads_sum or not self.norm else self.norm


class _AllRecorded(Exception):
    """The last layer has been called: what comes behind it need not run."""


class ResidualStream:
    """Hidden states of a model in front of one of its layers, batch by batch, and the arguments of its layers.

    Layers that return the stream alone do not run while their arguments are recorded: these seldom depend on it, which
    is checked on the last batch.

    Attributes:
        layers: the model's layers.
        hidden: hidden states of every batch, in front of the first layer at first.
        is_large: the hidden states lie on disk (:mod:`llm_pruner.refit.mapped`), and so should what is as large.

    Raises:
        PrunerError: running the layers one after the other does not give the model's own output.
    """

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList, batches: list[Any]):
        self.layers = layers
        self.hidden: list[torch.Tensor] = []
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []  # by batch and layer
        self.device = device = native_compute(model).device
        last, plain = self._run_whole(model, batches[-1].to(device))
        self.is_large = last.nbytes * len(batches) > IN_MEMORY
        for ids in track(batches, "recording the residual stream"):
            self._record(model, ids.to(device), calls=len(plain), runs=not all(plain))
        hidden = self.hidden[-1]
        for i in range(len(layers)):
            hidden = self.run(i, len(batches) - 1, hidden)
        if not torch.allclose(hidden.float(), last.float(), rtol=1e-3, atol=1e-4 * last.abs().max().item()):
            raise PrunerError("this model cannot be compensated: its layers pass on more than one stream")

    def _run_whole(self, model: PreTrainedModel, ids: Inputs) -> tuple[torch.Tensor, list[bool]]:
        """Run a batch; return the stream behind the last layer, and for every call if it returned the stream alone."""
        last: list[Any] = []
        plain: list[bool] = []

        def note(_: nn.Module, __: Any, output: Any) -> None:
            last[:] = [output]
            plain.append(isinstance(output, torch.Tensor))

        with forward_hooks([(layer, note) for layer in self.layers]):
            forward(model, ids)
        if not last:
            raise PrunerError("the calibration set does not reach all layers that were cut: give images or sounds")
        return hidden_out(last[0]), plain

    def _record(self, model: PreTrainedModel, ids: Inputs, *, calls: int, runs: bool) -> None:
        """Note the arguments that a batch gives every layer, and the stream before the first.

        Args:
            calls: of layers in a pass.
            runs: run the layers, not only what lies around them.
        """
        noted: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first: list[torch.Tensor] = []

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first.append(hidden_in(args, kwargs))
            del first[1:]
            noted.append((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))

        def replace(_: int, own: Forward) -> Forward:
            def run(*args: Any, **kwargs: Any) -> Any:
                if len(noted) == calls:
                    raise _AllRecorded
                return own(*args, **kwargs) if runs else hidden_in(args, kwargs)

            return run

        # Before all other hooks: a layer with hooks of its own is given what the model gives it.
        with (
            forward_hooks(before=[(layer, record) for layer in self.layers], with_kwargs=True, prepend=True),
            replaced_forwards(list(self.layers), replace),
            suppress(_AllRecorded),
        ):
            forward(model, ids)
        self._calls.append(noted)
        self.hidden += map(self.put, first)

    def put(self, states: torch.Tensor) -> torch.Tensor:
        """Return hidden states of a batch as they are kept: on disk if those of all batches are large."""
        if not self.is_large:
            return states
        give_back_memory()  # which freed states have left scattered
        return mapped(states)

    def on_device(self, states: torch.Tensor) -> torch.Tensor:
        """Return hidden states where the model computes, wherever :meth:`put` has left them."""
        return states.to(self.device) if self.is_large else states

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Return what :meth:`put` has left, one after the other along the first dim, of all processes."""
        if not self.is_large:
            return gathered(torch.cat(parts))
        whole = mapped_space((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
        torch.cat(parts, out=whole)
        return whole if count() == 1 else gathered(self.on_device(whole))

    def run(self, layer: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """Run one layer on ``hidden``, with the other arguments of that batch."""
        args, kwargs = self._calls[batch][layer]
        return hidden_out(self.layers[layer](self.on_device(hidden), *args, **kwargs))

    def run_noting(
        self, layer: int, batch: int, projections: list[Projection]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Run a layer on its batch; return the input of each projection, and the stream just behind each.

        Args:
            projections: added projections of the layer, in order. The stream behind the layer itself is under "".
        """
        reads: dict[str, torch.Tensor] = {}
        adds: dict[str, torch.Tensor] = {}
        block = self.layers[layer]
        sums: dict[str, torch.Tensor] = {}

        def note(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
                reads[name], adds[name] = args[0], output

            return hook

        normalized = [(block.get_submodule(one.norm), _keep_first(sums, one.name)) for one in projections if one.norm]
        modules = dict.fromkeys(name for one in projections for name in (one.name, one.added))
        with forward_hooks([(block.get_submodule(name), note(name)) for name in modules], before=normalized):
            stream = self.run(layer, batch, self.hidden[batch])
        behind = {"": stream} | sums
        for one in reversed(projections):  # what comes later is added as it is, and can be taken away again
            if not one.norm:
                behind[one.name] = stream
            if not one.norm_reads_sum:
                stream = stream - adds[one.added].view(stream.shape)
        return reads, behind

    def norm_inputs(self, layer: int, norms: list[str]) -> dict[str, torch.Tensor]:
        """Run a layer on its first batch; return what each of its norms reads, in the order in which they run."""
        block, read = self.layers[layer], dict[str, torch.Tensor]()
        with forward_hooks(before=[(block.get_submodule(name), _keep_first(read, name)) for name in norms]):
            self.run(layer, 0, self.hidden[0])
        return read

    def advance(self, layer: int, projections: list[Projection]) -> dict[str, list[torch.Tensor]]:
        """Move the stream behind ``layer``; return the stream behind each of its projections, batch by batch."""
        streams: dict[str, list[torch.Tensor]] = {one.name: [] for one in projections}
        for batch in range(len(self.hidden)):
            _, behind = self.run_noting(layer, batch, projections)
            self.hidden[batch] = self.put(behind[""])
            for name, kept in streams.items():
                kept.append(self.hidden[batch] if behind[name] is behind[""] else self.put(behind[name]))
        return streams


def _keep_first(kept: dict[str, torch.Tensor], name: str) -> Any:
    """Return a hook before a forward that keeps its first argument under a name."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        kept[name] = args[0]

    return hook


def single_stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return path and layers of the model's only stack.

    Raises:
        PrunerError: the model has several stacks, or none.
    """
    stacks = list(layer_lists(model).items())
    if len(stacks) != 1:
        raise PrunerError(f"a search over widths needs one stack of layers, not {len(stacks)}")
    return stacks[0]


@torch.no_grad()
def added_projections(
    model: PreTrainedModel, calibration: Inputs, layers: nn.ModuleList | None = None
) -> list[list[Projection]]:
    """Return, for every layer, its projections whose output is added to the residual stream, in order.

    In layers that normalise the stream behind each sum, as BERT's do, the sum is what counts; in those that normalise
    the output of a projection before adding it, as Gemma 2's do, that output.

    Args:
        calibration: LongTensor ``[samples, tokens]``; the beginning of the first sample is used.
        layers: one of the model's stacks (default: the only one).

    Raises:
        PrunerError: the model has no single stack of layers, or these do not pass on one stream.
    """
    layers = single_stack(model)[1] if layers is None else layers
    with evaluating(model), computing(model):
        sample = calibration[:1]
        short = sample if isinstance(sample, ModelInputs) else sample[:, :PROBE_TOKENS]  # it is run many times
        stream = ResidualStream(model, layers, [short])
        projections: list[list[Projection]] = []
        for i in track(range(len(layers)), "finding projections to compensate"):
            projections.append(_added_in_layer(stream, i) or _normalized_in_layer(stream, i))
            stream.advance(i, [])
    return projections


def _added_in_layer(stream: ResidualStream, layer: int) -> list[Projection]:
    """Return the added projections of a layer, last first found.

    A change of the last one's output changes the layer's output alike; with its output silenced, so does the one
    before it.
    """
    block = stream.layers[layer]
    candidates = [Projection(name) for name, _ in _linear_modules(block)] + _normalized_alone(stream, layer)
    found: list[Projection] = []

    def silence(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(output)

    while True:
        with forward_hooks([(block.get_submodule(one.added), silence) for one in found]):
            last = _last_added(stream, layer, [one for one in candidates if one not in found])
        if last is None:
            return found
        found.insert(0, last)


def _normalized_alone(stream: ResidualStream, layer: int) -> list[Projection]:
    """Return the linear modules of a layer whose output is all that a norm reads."""
    block = stream.layers[layer]
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            outputs[name] = output

        return hook

    with forward_hooks([(module, keep(name)) for name, module in _linear_modules(block)]):
        read = stream.norm_inputs(layer, _norms(block))
    return [
        Projection(name, norm)
        for norm, tensor in read.items()
        for name, output in outputs.items()
        if isinstance(output, torch.Tensor) and output.shape == tensor.shape and torch.equal(output, tensor)
    ]


def _last_added(stream: ResidualStream, layer: int, candidates: list[Projection]) -> Projection | None:
    """Return the last of a layer's candidates whose moved output moves the layer's output alike."""
    hidden = stream.hidden[0]
    plain = stream.run(layer, 0, hidden)
    moved = _movement(plain)
    for one in reversed(candidates):
        module = stream.layers[layer].get_submodule(one.added)
        fits: list[bool] = []

        def move(_: nn.Module, __: Any, output: torch.Tensor, fits: list[bool] = fits) -> torch.Tensor:
            fits.append(isinstance(output, torch.Tensor) and output.numel() == plain.numel())  # routers return more
            return output + moved.view(output.shape) if fits[-1] else output

        with forward_hooks([(module, move)]):
            change = stream.run(layer, 0, hidden) - plain
        if fits == [True] and _is_moved_by(change, moved):
            return one
    return None


def added_experts(stream: ResidualStream, layer: int) -> list[str]:
    """Return the modules of a layer that own stacks of experts and whose output is added to the stream unchanged.

    Experts whose inputs are scaled are left out in several processes, each of which has another number of inputs.
    """
    block, hidden = stream.layers[layer], stream.hidden[0]
    stacks = {name: sizes[0] for name, module in block.named_modules() if (sizes := stack_sizes(module))}
    if not stacks:
        return []
    plain = stream.run(layer, 0, hidden)
    moved, found = _movement(plain), []
    for name, experts in stacks.items():
        fits: list[bool] = []

        def move(
            _: nn.Module, args: Any, kwargs: Any, output: Any, *, fits: list[bool] = fits, experts: int = experts
        ) -> Any:
            summed = top_k_call(args, kwargs) is not None  # else the sum over experts follows
            gated = count() == 1 and gated_inputs(args, kwargs, experts) is not None
            routed = isinstance(output, torch.Tensor) and (summed or gated)
            fits.append(routed and output.numel() == plain.numel() * (1 if summed else experts))
            if not fits[-1]:
                return output
            movement = moved.view(-1, moved.shape[-1])
            rest = output.reshape(-1, moved.shape[-1])[len(movement) :]
            return output + torch.cat([movement, torch.zeros_like(rest)]).view(output.shape)

        with forward_hooks([(block.get_submodule(name), move)], with_kwargs=True):
            change = stream.run(layer, 0, hidden) - plain
        if fits == [True] and _is_moved_by(change, moved):
            found.append(name)
    return found


def stack_sizes(module: nn.Module) -> list[int]:
    """Return the number of experts in each of the stacks that a module owns itself."""
    return [len(parameter) for parameter in module.parameters(recurse=False) if parameter.ndim == 3]


def _normalized_in_layer(stream: ResidualStream, layer: int) -> list[Projection]:
    """Return the projections of a layer whose sum with the stream is normalised, as in layers of BERT's kind, in order.

    Moving the output of such a projection moves what the norm reads alike, and the norm reads more than that output.
    """
    block, movement = stream.layers[layer], _movement(stream.hidden[0])
    norms = _norms(block)
    plain = stream.norm_inputs(layer, norms)
    found: dict[str, str] = {}
    for name, module in _linear_modules(block):
        outputs: list[torch.Tensor] = []

        def move(_: nn.Module, __: Any, output: torch.Tensor, outputs: list[torch.Tensor] = outputs) -> torch.Tensor:
            if not isinstance(output, torch.Tensor):
                return output
            outputs.append(output)
            return output + movement.view(output.shape) if output.numel() == movement.numel() else output

        with forward_hooks([(module, move)]):
            moved = stream.norm_inputs(layer, norms)
        if len(outputs) != 1 or outputs[0].numel() != movement.numel():
            continue
        for norm, read in plain.items():
            alike = read.shape == movement.shape and _is_moved_by(moved[norm] - read, movement)
            if alike and not torch.allclose(read, outputs[0].view(read.shape)):
                found.setdefault(norm, name)
    return [Projection(found[norm], norm, norm_reads_sum=True) for norm in plain if norm in found]


def _norms(block: nn.Module) -> list[str]:
    return [name for name, module in block.named_modules() if type(module).__name__.endswith("Norm")]


def _linear_modules(block: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in block.named_modules() if isinstance(module, (nn.Linear, Conv1D))]


def _movement(hidden: torch.Tensor) -> torch.Tensor:
    """Return small noise of the shape of hidden states, the same whenever it is drawn."""
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    return 0.1 * hidden.abs().mean() * noise.to(hidden)


def _is_moved_by(change: torch.Tensor, movement: torch.Tensor) -> bool:
    return torch.allclose(change.float(), movement.float(), atol=0.02 * movement.abs().max().item())

"""Find the projections of a layer, and its experts, whose output is added to the residual stream."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import PrunerError
from ..models.blockwise import computing
from ..models.experts import gated_inputs, top_k_call
from ..models.hooks import forward_hooks
from ..models.inputs import Inputs, ModelInputs
from ..models.per_layer import layer_lists
from ..models.processes import count
from ..models.running import evaluating
from ..progress import track
from .stream import Projection, ResidualStream

PROBE_TOKENS = 16  # tokens on which projections are probed
NEARLY = 0.01  # factors this near to 0 or 1 are taken for it


def single_stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return path and layers of the model's only stack.

    Raises:
        PrunerError: the model has several stacks, or none.
    """
    stacks = list(layer_lists(model).items())
    if len(stacks) != 1:
        raise PrunerError(f"a model with one stack of layers is needed, and this one has {len(stacks)}")
    return stacks[0]


@torch.no_grad()
def added_projections(
    model: PreTrainedModel, calibration: Inputs, layers: nn.ModuleList | None = None
) -> list[list[Projection]]:
    """Return, for every layer, its projections whose output is added to the residual stream, in order.

    In layers that normalise the stream behind each sum, as BERT's do, the sum is what counts. In those that normalise
    the output of a projection before adding it, as Gemma 2's do, the norm is what the stream is given.

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
            last = _last_added(stream, layer, candidates)
        if last is None:
            return found
        found.insert(0, last)
        candidates = [one for one in candidates if one.name != last.name]


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
    """Return the last of a layer's candidates whose moved output moves the layer's output alike, up to a factor."""
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
        if fits == [True] and (factor := _factor(change, moved)):
            return replace(one, factor=factor)
    return None


def added_experts(stream: ResidualStream, layer: int) -> dict[str, float]:
    """Return the modules of a layer that own stacks of experts and whose output is added to the stream.

    Each has the factor by which it is multiplied before.

    Experts whose inputs are scaled are left out in several processes, each of which has another number of inputs.
    """
    block, hidden = stream.layers[layer], stream.hidden[0]
    stacks = {name: sizes[0] for name, module in block.named_modules() if (sizes := stack_sizes(module))}
    if not stacks:
        return {}
    plain = stream.run(layer, 0, hidden)
    moved, found = _movement(plain), dict[str, float]()
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
        if fits == [True] and (factor := _factor(change, moved)):
            found[name] = factor
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
    found: dict[str, Projection] = {}
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
            factor = _factor(moved[norm] - read, movement) if read.shape == movement.shape else None
            if factor and not torch.allclose(read, factor * outputs[0].view(read.shape)):
                found[norm] = Projection(name, norm, norm_reads_sum=True, factor=factor)  # the last before the norm
    in_order = [found[norm] for norm in plain if norm in found]
    return list({one.name: one for one in reversed(in_order)}.values())[::-1]  # each in front of its first norm


def _norms(block: nn.Module) -> list[str]:
    modules = [(name, module) for name, module in block.named_modules() if type(module).__name__.endswith("Norm")]
    return [name for name, module in modules if not list(module.children())]


def _linear_modules(block: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in block.named_modules() if isinstance(module, (nn.Linear, Conv1D))]


def _movement(hidden: torch.Tensor) -> torch.Tensor:
    """Return small noise of the shape of hidden states, the same whenever it is drawn."""
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    return 0.1 * hidden.abs().mean() * noise.to(hidden)


def _factor(change: torch.Tensor, movement: torch.Tensor) -> float | None:
    """Return the factor of a movement that has led to a change; None if no factor explains it."""
    change, movement = change.float(), movement.float()
    factor = ((change * movement).sum() / movement.square().sum()).item()
    factor = 1.0 if abs(factor - 1) < NEARLY else factor
    scaled = factor * movement
    fits = torch.allclose(change, scaled, atol=0.02 * scaled.abs().max().item())
    return factor if fits and abs(factor) > NEARLY else None

"""Compensation: after removal, a projection in each layer is refitted so that the layer says what it said before.

Removing neurons and heads changes what every later layer reads. Here the layers are visited from first to last with
the original's stream h and the pruned model's stream p side by side; in each, the last projection W whose output is
added to the stream as it is (``down_proj`` of a Llama) is moved by the ridge regression

    D = argmin  sum_t  |h_t - p_t - D x_t|^2 / |h_t|^2  +  lambda * mean(x^2) * |D|^2

over the calibration tokens t, where x is what W reads. The error is relative to the stream, since the next norm
divides by it; without that, the few tokens of huge norm that language models have would decide alone. As p carries the
errors of all layers before, each layer also mends what those left. lambda is chosen on calibration samples held out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import PrunerError
from ..graph import evaluating, layer_lists, model_inputs

RIDGES = (1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
BATCH = 8  # samples in a forward pass
HELD_OUT = 4  # every 4th batch chooses lambda
MIN_SAMPLES = 4 * BATCH


@dataclass
class Refit:
    """What happened to a layer: the relative squared error of its output on held-out samples, and lambda.

    ``ridge`` is None where nothing helped and the layer was left alone.
    """

    module: str
    before: float
    after: float
    ridge: float | None


@dataclass
class CompensationReport:
    layers: list[Refit] = field(default_factory=list)


@torch.no_grad()
def compensate(model: PreTrainedModel, pruned: PreTrainedModel, calibration: torch.Tensor) -> CompensationReport:
    """Refit the projections of ``pruned`` in place so that its layers say what those of ``model`` say.

    Args:
        model: the original.
        pruned: what :func:`llm_pruner.apply` made of it, with as many layers.
        calibration: LongTensor ``[samples, tokens]``; at least 32 samples, a quarter of which is held out.

    Raises:
        PrunerError: the two do not have one stack of as many layers, or these do not pass a stream on.
    """
    stacks = [list(layer_lists(m).items()) for m in (model, pruned)]
    if [len(s) for s in stacks] != [1, 1] or len(stacks[0][0][1]) != len(stacks[1][0][1]):
        raise PrunerError("compensation needs one stack of as many layers in both models")
    if len(calibration) < MIN_SAMPLES:
        raise PrunerError(f"compensation needs at least {MIN_SAMPLES} calibration samples, not {len(calibration)}")
    path = stacks[1][0][0]
    batches = list(calibration.split(BATCH))
    with evaluating(model), evaluating(pruned):
        before, after = (_Stream(m, layers, batches) for m, [(_, layers)] in zip((model, pruned), stacks, strict=True))
        if before.hidden[0].shape != after.hidden[0].shape:
            raise PrunerError("compensation compares hidden states, and the pruned model's are narrower")
        report = CompensationReport()
        for i in range(len(after.layers)):
            targets = before.advance(i)
            if refit := _refit(after, i, targets):
                refit.module = f"{path}.{i}.{refit.module}"
                report.layers.append(refit)
            after.advance(i)
    return report


class _Stream:
    """The hidden states of a model between two layers, batch by batch, and how its layers are called."""

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList, batches: list[torch.Tensor]):
        self.layers = layers
        self.calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []  # of every batch and layer
        self.hidden: list[torch.Tensor] = []
        for ids in batches:
            self.calls.append([])
            first, last = self._record(model, ids.to(model.device))
            self.hidden.append(first)
        again = self.hidden[-1]
        for i in range(len(layers)):
            again = self.run(i, len(batches) - 1, again)
        if not torch.allclose(again.float(), last.float(), rtol=1e-3, atol=1e-4 * last.abs().max().item()):
            raise PrunerError("compensation does not know this model: its layers pass on more than one stream")

    def _record(self, model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            seen.setdefault("first", hidden)
            rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            self.calls[-1].append((args[1:], rest))

        def after(_: nn.Module, __: Any, output: Any) -> None:
            seen["last"] = _first(output)

        # First of all hooks: a layer with hooks of its own is given what the model gives it.
        handles = [m.register_forward_pre_hook(before, with_kwargs=True, prepend=True) for m in self.layers]
        handles.append(self.layers[-1].register_forward_hook(after))
        try:
            model(**model_inputs(model, ids), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return seen["first"], seen["last"]

    def run(self, layer: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = self.calls[batch][layer]
        return _first(self.layers[layer](hidden, *args, **kwargs))

    def advance(self, layer: int) -> list[torch.Tensor]:
        self.hidden = [self.run(layer, i, hidden) for i, hidden in enumerate(self.hidden)]
        return self.hidden


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _refit(stream: _Stream, layer: int, targets: list[torch.Tensor]) -> Refit | None:
    """Move one projection of a layer so that its output comes close to ``targets``; None where none is fit for it."""
    name = _added_projection(stream, layer)
    if name is None:
        return None
    module = stream.layers[layer].get_submodule(name)
    sums = {True: _Sums(), False: _Sums()}  # held out or not
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        for i, (hidden, target) in enumerate(zip(stream.hidden, targets, strict=True)):
            out = stream.run(layer, i, hidden)
            sums[i % HELD_OUT == HELD_OUT - 1].add(seen.pop(), target, out)
    finally:
        handle.remove()
    fitted, held_out = sums[False], sums[True]
    gains = {ridge: held_out.gain(fitted.solve(ridge)) for ridge in RIDGES}
    best = max(RIDGES, key=gains.__getitem__)
    before = held_out.error / held_out.tokens
    if gains[best] <= 0:
        return Refit(name, before, before, None)
    change = (fitted + held_out).solve(best)
    weight = cast(torch.Tensor, module.weight)
    weight.add_((change if isinstance(module, Conv1D) else change.T).to(weight))
    return Refit(name, before, (held_out.error - gains[best]) / held_out.tokens, best)


def _added_projection(stream: _Stream, layer: int) -> str | None:
    """The last projection whose output is added to the stream as it is: moving it moves the layer's output alike."""
    block, hidden = stream.layers[layer], stream.hidden[0]
    plain = stream.run(layer, 0, hidden)
    moved = 0.1 * plain.abs().mean() * torch.randn(plain.shape, generator=torch.Generator().manual_seed(0)).to(plain)
    projections = [(n, m) for n, m in block.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    for name, module in reversed(projections):
        fits: list[bool] = []

        def add(_: nn.Module, __: Any, output: torch.Tensor, fits: list[bool] = fits) -> torch.Tensor:
            fits.append(output.numel() == plain.numel())
            return output + moved.view(output.shape) if fits[-1] else output

        handle = module.register_forward_hook(add)
        try:
            change = stream.run(layer, 0, hidden) - plain
        finally:
            handle.remove()
        if fits == [True] and torch.allclose(change.float(), moved.float(), atol=0.02 * moved.abs().max().item()):
            return name
    return None


class _Sums:
    """What the regression needs of the tokens: X' V X, X' V E and sum V E^2, with E the error and V = 1 / |h|^2."""

    def __init__(self) -> None:
        self.tokens = 0
        self.error = 0.0
        self.inputs: Any = 0
        self.cross: Any = 0

    def add(self, inputs: torch.Tensor, target: torch.Tensor, out: torch.Tensor) -> None:
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        h = target.reshape(-1, target.shape[-1]).float()
        error = h - out.reshape(h.shape).float()
        scale = h.square().sum(1, keepdim=True).clamp_min(1e-12).rsqrt()
        x, error = x * scale, error * scale
        self.tokens += len(x)
        self.error += error.square().sum().item()
        self.inputs = self.inputs + x.T @ x
        self.cross = self.cross + x.T @ error

    def __add__(self, other: _Sums) -> _Sums:
        out = _Sums()
        for name, value in vars(self).items():
            setattr(out, name, value + vars(other)[name])
        return out

    def solve(self, ridge: float) -> torch.Tensor:
        """The change of the weight, ``[inputs, outputs]``."""
        strength = ridge * self.inputs.diagonal().mean().clamp_min(1e-20)
        shifted = self.inputs + strength * torch.eye(len(self.inputs), device=self.inputs.device)
        return torch.linalg.solve(shifted, self.cross)

    def gain(self, change: torch.Tensor) -> float:
        """How much of the error a change of the weight takes away."""
        return (2 * (change * self.cross).sum() - (change * (self.inputs @ change)).sum()).item()

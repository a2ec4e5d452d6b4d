"""Compensation: after removal, projections of each layer are refitted so that the layer says what it said before.

Removing neurons and heads changes what every later layer reads. Here the layers are visited from first to last with
the original's stream h and the pruned model's stream p side by side; in each, every projection W whose output is added
to the stream as it is (``o_proj`` and ``down_proj`` of a Llama) is moved by the ridge regression

    D = argmin  sum_t v_t |h_t - p_t - D x_t|^2  +  lambda * sum_j mean(x_j^2) |D_j|^2

over the calibration tokens t, where x is what W reads and h_t - p_t the error of the stream just behind it. The prior
is the same for every channel once its scale is taken out. v_t is 1 for ordinary tokens; the few of huge norm that
language models have, which would decide alone otherwise, count 1 / |h_t|^2. As p carries the errors of all layers
before, each layer also mends what those left. lambda is chosen on calibration samples held out. A projection with a
bias has one more channel, always 1, whose column moves the bias; with the method ``bias`` that is the only one, which
is FLAP's compensation (arXiv 2312.11983, section 3) of what all layers so far have lost on average.

A damaged model is too sure of itself. Last of all its logits are scaled by the one number that brings its predictions
closest to the original's (temperature scaling, Guo et al., arXiv 1706.04599, section 4.2, with the original's
probabilities as labels), folded into the weights before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import PrunerError
from ..models.blockwise import computing, native_compute
from ..models.layers import hidden_in, hidden_out
from ..models.per_layer import layer_lists
from ..models.running import check_calibration, evaluating, model_inputs

TEMPERATURES = [round(0.7 + 0.02 * i, 2) for i in range(21)]
TEMPER_ON = 32  # samples
RIDGES = (1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SAMPLES_PER_PASS = 8  # samples in a forward pass
PROBE = 16  # tokens to find out on where projections lead
HELD_OUT = 4  # every 4th batch chooses lambda
MIN_SAMPLES = 4 * SAMPLES_PER_PASS
METHODS = ("least_squares", "bias")


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
    """What happened to the layers, and the factor of the logits (None where no weight scales them)."""

    layers: list[Refit] = field(default_factory=list)
    temperature: float | None = None


@torch.no_grad()
def compensate(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    calibration: torch.Tensor,
    method: str = "least_squares",
    kept: Sequence[int] | None = None,
) -> CompensationReport:
    """Refit the projections of ``pruned`` in place so that its layers say what those of ``model`` say.

    Args:
        model: the original.
        pruned: what :func:`llm_pruner.apply` made of it.
        calibration: LongTensor ``[samples, tokens]``; at least 32 samples, a quarter of which is held out.
        method: ``least_squares`` moves weights and biases, ``bias`` nothing but biases
            (:func:`llm_pruner.surgery.with_biases` gives a model some).
        kept: the layers of the original that the pruned model's are, in order; all of them by default. The last
            projection before a gap makes up for the layers that are gone: it aims at the stream behind them.

    Raises:
        PrunerError: the two are swapped or do not have one stack of layers each, these do not pass a stream on, the
            calibration set is not for them, or there is no bias to move.
    """
    if method not in METHODS:
        raise PrunerError(f"unknown compensation {method!r}; choose from {', '.join(METHODS)}")
    (_, original), (path, layers) = _stack(model), _stack(pruned)
    kept = list(range(len(original)) if kept is None else kept)
    if len(kept) != len(layers) or kept != sorted(set(kept)) or kept[-1] >= len(original):
        raise PrunerError("compensation needs to know which layers of the original the pruned model's are")
    calibration = check_calibration(model, calibration)
    words = [cast(torch.Tensor, m.get_input_embeddings().weight).shape[0] for m in (model, pruned)]
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, pruned)]
    if words[0] != words[1]:
        raise PrunerError(f"compensation needs one vocabulary, and these have {words[0]} and {words[1]} tokens")
    if sizes[0] < sizes[1]:
        raise PrunerError("the pruned model is larger than the original: give the original first")
    if len(calibration) < MIN_SAMPLES:
        raise PrunerError(f"compensation needs at least {MIN_SAMPLES} calibration samples, not {len(calibration)}")
    added = added_projections(pruned, calibration)
    if method == "bias" and not any(
        _bias(layers[i].get_submodule(name)) is not None for i, names in enumerate(added) for name in names
    ):
        raise PrunerError("no projection whose output is added to the stream has a bias: use least_squares")
    batches = list(calibration.split(SAMPLES_PER_PASS))
    report = CompensationReport()
    with evaluating(model), evaluating(pruned), computing(model), computing(pruned):
        before, after = _Stream(model, original, batches), _Stream(pruned, layers, batches)
        if before.hidden[0].shape != after.hidden[0].shape:
            raise PrunerError("compensation compares hidden states, and the pruned model's are narrower")
        for gone in range(kept[0]):
            before.advance(gone, [])
        for i, names in enumerate(added):
            target = before.advance(kept[i], names)
            for gone in range(kept[i] + 1, [*kept, len(original)][i + 1]):
                before.advance(gone, [])
                target |= {name: list(before.hidden) for name in names[-1:]}
            floor = torch.cat([h.float().square().sum(-1).flatten() for h in before.hidden]).median().item()
            for name in names:
                refit = _refit(after, i, name, names, target[name], floor, method)
                refit.module = f"{path}.{i}.{name}"
                report.layers.append(refit)
            after.advance(i, [])
    report.temperature = _temper(model, pruned, calibration[-TEMPER_ON:])
    return report


@torch.no_grad()
def added_projections(model: PreTrainedModel, calibration: torch.Tensor) -> list[list[str]]:
    """For every layer, its projections whose output is added to the stream as it is, in the order in which they are.

    Raises:
        PrunerError: the model has no single stack of layers, or these do not pass a stream on.
    """
    _, layers = _stack(model)
    with evaluating(model), computing(model):
        stream = _Stream(model, layers, [calibration[:1, :PROBE]])  # short: it is run many times
        out: list[list[str]] = []
        for i in range(len(layers)):
            out.append(_added(stream, i))
            stream.advance(i, [])
    return out


def _stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    stacks = list(layer_lists(model).items())
    if len(stacks) != 1:
        raise PrunerError(f"compensation needs one stack of layers, not {len(stacks)}")
    return stacks[0]


def _bias(module: nn.Module) -> torch.Tensor | None:
    return cast("torch.Tensor | None", module.bias)


class _Stream:
    """The hidden states of a model between two layers, batch by batch, and how its layers are called."""

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList, batches: list[torch.Tensor]):
        self.layers = layers
        self.calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []  # of every batch and layer
        self.hidden: list[torch.Tensor] = []
        for ids in batches:
            self.calls.append([])
            first, last = self._record(model, ids.to(native_compute(model).device))
            self.hidden.append(first)
        again = self.hidden[-1]
        for i in range(len(layers)):
            again = self.run(i, len(batches) - 1, again)
        if not torch.allclose(again.float(), last.float(), rtol=1e-3, atol=1e-4 * last.abs().max().item()):
            raise PrunerError("compensation does not know this model: its layers pass on more than one stream")

    def _record(self, model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.setdefault("first", hidden_in(args, kwargs))
            rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            self.calls[-1].append((args[1:], rest))

        def after(_: nn.Module, __: Any, output: Any) -> None:
            seen["last"] = hidden_out(output)

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
        return hidden_out(self.layers[layer](hidden, *args, **kwargs))

    def behind(
        self, layer: int, batch: int, names: list[str]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Run a layer: what each projection reads, and the stream just behind each (and, under "", the layer)."""
        reads: dict[str, torch.Tensor] = {}
        adds: dict[str, torch.Tensor] = {}
        handles = []
        for name in names:

            def note(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor, name: str = name) -> None:
                reads[name], adds[name] = args[0], output

            handles.append(self.layers[layer].get_submodule(name).register_forward_hook(note))
        try:
            stream = self.run(layer, batch, self.hidden[batch])
        finally:
            for handle in handles:
                handle.remove()
        behind = {"": stream}
        for name in reversed(names):  # what comes later is added as it is, and can be taken away again
            behind[name] = stream
            stream = stream - adds[name].view(stream.shape)
        return reads, behind

    def advance(self, layer: int, names: list[str]) -> dict[str, list[torch.Tensor]]:
        """Go one layer on; returns the stream behind each projection, batch by batch."""
        out: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for batch in range(len(self.hidden)):
            _, behind = self.behind(layer, batch, names)
            self.hidden[batch] = behind[""]
            for name in names:
                out[name].append(behind[name])
        return out


def _refit(
    stream: _Stream,
    layer: int,
    name: str,
    names: list[str],
    targets: list[torch.Tensor],
    floor: float,
    method: str,
) -> Refit:
    """Move one projection of a layer so that the stream behind it comes close to ``targets``."""
    module = stream.layers[layer].get_submodule(name)
    bias = _bias(module)
    sums = {True: _Sums(floor), False: _Sums(floor)}  # held out or not
    for i, target in enumerate(targets):
        reads, behind = stream.behind(layer, i, names)
        read = reads[name] if method == "least_squares" else reads[name][..., :0]
        if bias is not None:
            read = torch.cat([read, torch.ones_like(reads[name][..., :1])], -1)
        sums[i % HELD_OUT == HELD_OUT - 1].add(read, target, behind[name])
    fitted, held_out = sums[False], sums[True]
    before = held_out.error / held_out.tokens
    if not fitted.inputs.numel():
        return Refit(name, before, before, None)
    gains = {ridge: held_out.gain(fitted.solve(ridge)) for ridge in RIDGES}
    best = max(RIDGES, key=gains.__getitem__)
    if not gains[best] > 0:
        return Refit(name, before, before, None)
    change = (fitted + held_out).solve(best)
    if bias is not None:
        bias.add_(change[-1].to(bias))
        change = change[:-1]
    if len(change):
        weight = cast(torch.Tensor, module.weight)
        weight.add_((change if isinstance(module, Conv1D) else change.T).to(weight))
    return Refit(name, before, (held_out.error - gains[best]) / held_out.tokens, best)


def _added(stream: _Stream, layer: int) -> list[str]:
    """The added projections of a layer.

    The last one moves the layer's output as it is moved itself; with that one silent, so does the one before.
    """
    block, hidden = stream.layers[layer], stream.hidden[0]
    found: list[str] = []
    silent: list[Any] = []
    try:
        while name := _last_added(stream, layer, hidden, found):
            found.insert(0, name)
            module = block.get_submodule(name)
            silent.append(module.register_forward_hook(lambda _, __, output: torch.zeros_like(output)))
    finally:
        for handle in silent:
            handle.remove()
    return found


def _last_added(stream: _Stream, layer: int, hidden: torch.Tensor, known: list[str]) -> str | None:
    plain = stream.run(layer, 0, hidden)
    moved = 0.1 * plain.abs().mean() * torch.randn(plain.shape, generator=torch.Generator().manual_seed(0)).to(plain)
    modules = stream.layers[layer].named_modules()
    for name, module in reversed([(n, m) for n, m in modules if isinstance(m, (nn.Linear, Conv1D)) and n not in known]):
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
    """What the regression needs of the tokens: X' V X, X' V E and sum V E^2, with E the error and V the weights.

    A token counts 1 / |h|^2, but none more than one whose |h|^2 is ``floor``.
    """

    def __init__(self, floor: float) -> None:
        self.floor = max(floor, 1e-12)
        self.tokens = 0
        self.error = 0.0
        self.inputs: Any = 0
        self.cross: Any = 0

    def add(self, inputs: torch.Tensor, target: torch.Tensor, out: torch.Tensor) -> None:
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        h = target.reshape(-1, target.shape[-1]).float()
        error = h - out.reshape(h.shape).float()
        scale = h.square().sum(1, keepdim=True).clamp_min(self.floor).rsqrt()
        x, error = x * scale, error * scale
        self.tokens += len(x)
        self.error += error.square().sum().item()
        self.inputs = self.inputs + x.T @ x
        self.cross = self.cross + x.T @ error

    def __add__(self, other: _Sums) -> _Sums:
        out = _Sums(self.floor)
        for name in ("tokens", "error", "inputs", "cross"):
            setattr(out, name, getattr(self, name) + getattr(other, name))
        return out

    def solve(self, ridge: float) -> torch.Tensor:
        """The change of the weight, ``[inputs, outputs]``."""
        power = self.inputs.diagonal()
        prior = power.clamp_min(power.mean().item() * 1e-3 + 1e-20)
        return torch.linalg.solve(self.inputs + torch.diag(ridge * prior), self.cross)

    def gain(self, change: torch.Tensor) -> float:
        """How much of the error a change of the weight takes away."""
        return (2 * (change * self.cross).sum() - (change * (self.inputs @ change)).sum()).item()


@torch.no_grad()
def _temper(model: PreTrainedModel, pruned: PreTrainedModel, ids: torch.Tensor) -> float | None:
    """Scale the pruned model's logits to be closest to the original's; returns the factor, None where nothing can."""
    weights = _scaling(pruned, ids[:1])
    if not weights:
        return None
    losses = torch.zeros(len(TEMPERATURES), dtype=torch.float64)
    with evaluating(model), evaluating(pruned), computing(model) as compute, computing(pruned):
        for row in ids.to(compute.device).split(1):
            wanted, found = (m(**model_inputs(m, row), use_cache=False).logits[0, :-1].float() for m in (model, pruned))
            wanted = wanted.softmax(-1)
            for i, factor in enumerate(TEMPERATURES):
                losses[i] += cross_entropy(found * factor, wanted, reduction="sum").double().cpu()
    best = TEMPERATURES[int(losses.argmin())]
    for weight in weights:
        weight.mul_(best)
    return best


def _scaling(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """The parameters that scale all logits when they are scaled: those of the last norm, or of an untied head."""
    inside = tuple(f"{path}." for path in layer_lists(model))
    outside = [(n, m) for n, m in model.named_modules() if not n.startswith(inside) and not list(m.children())]

    def logits() -> torch.Tensor:
        with evaluating(model), computing(model) as compute:
            return model(**model_inputs(model, ids.to(compute.device)), use_cache=False).logits.float()

    plain = logits()
    for _, module in reversed(outside):
        weights = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        if not weights or any(p is model.get_input_embeddings().weight for p in weights):
            continue
        saved = [p.clone() for p in weights]
        for weight in weights:
            weight.mul_(0.5)
        changed = logits()
        for weight, before in zip(weights, saved, strict=True):
            weight.copy_(before)
        if torch.allclose(changed, 0.5 * plain, rtol=1e-2, atol=1e-3 * plain.abs().max().item()):
            return weights
    return []

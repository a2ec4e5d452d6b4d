"""Refit the down projections of experts, with the tokens that are routed to them.

The weight of expert j reads x_j(t) = g_j(t) a_j(t), the gate of token t times the activation of the expert; where a
model scales what experts read instead (Llama 4), the activation alone. Its change
solves the regression of :mod:`llm_pruner.refit.compensate` over the tokens that are routed to j, and the error of the
stream at these tokens shrinks by it before the next expert of the layer is fitted.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..importance.activation import Readers
from ..models.blockwise import native_compute
from ..models.experts import TopKCall, gated_inputs, one_each, top_k_call
from ..models.hooks import forward_hooks
from ..models.processes import gathered, rank
from .added import stack_sizes
from .regression import HELD_OUT, RegressionSums, best_ridge
from .stream import ResidualStream

AT_ONCE = 1 << 14  # tokens


@dataclass(frozen=True, kw_only=True)
class ExpertRefit:
    """Outcome for the experts of one module: relative squared errors, and the lower median of lambda."""

    before: float
    after: float
    ridge: float | None


@dataclass(kw_only=True)
class _Routed:
    """Tokens of all batches: what experts read, and the stream behind the layer.

    Attributes:
        call: rows of hidden states, the experts that read them, and their gates, with all factors on the way.
        token: index of each row's token, LongTensor ``[rows]``.
        gates_inputs: True where the model scales the rows themselves, and all gates are 1.
        target: the original's stream ``[tokens, hidden]``.
        behind: the pruned model's.
        is_held_out: True for tokens that choose lambda, bool ``[tokens]``.
    """

    call: TopKCall
    token: torch.Tensor
    gates_inputs: bool
    target: torch.Tensor
    behind: torch.Tensor
    is_held_out: torch.Tensor

    def parts_of(self, expert: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield the tokens that are routed to an expert, their hidden states and gates, some thousands at a time."""
        hidden, index, gates = self.call
        rows, slots = (index == expert).nonzero(as_tuple=True)
        for row, slot in zip(rows.split(AT_ONCE), slots.split(AT_ONCE), strict=True):
            yield self.token[row], _rows(hidden, row), gates[row, slot, None].float()

    def add(self, fitted: RegressionSums, held_out: RegressionSums, tokens: torch.Tensor, inputs: torch.Tensor) -> None:
        """Add tokens to the sums of the fitted and of the held-out ones."""
        for sums, chosen in ((fitted, ~self.is_held_out[tokens]), (held_out, self.is_held_out[tokens])):
            target, behind = (_rows(states, tokens[chosen]).to(inputs) for states in (self.target, self.behind))
            sums.add(inputs[chosen], target, behind)


def refit_experts(
    model: PreTrainedModel,
    stream: ResidualStream,
    layer: int,
    name: str,
    *,
    factor: float,
    targets: list[torch.Tensor],
    floor: float,
) -> ExpertRefit:
    """Move the down projections of the experts of a layer, in place.

    Args:
        model: pruned model.
        stream: its residual stream, in front of the layer.
        name: path of the module of experts in the layer.
        factor: by which its output is multiplied before it is added to the stream.
        targets: the original's stream behind the layer, by batch.
        floor: squared norm of hidden states, as of :class:`RegressionSums`.
    """
    module = stream.layers[layer].get_submodule(name)
    routed = _collect(stream, layer, module, targets, factor=factor)
    reader = _DownInputs(model, module, gates_inputs=routed.gates_inputs)
    _, held_out = whole = RegressionSums(floor), RegressionSums(floor)
    for tokens in torch.arange(len(routed.target), device=routed.token.device).split(AT_ONCE):
        routed.add(*whole, tokens, torch.empty(len(tokens), 0, device=stream.device))
    error, ridges = held_out.error, []
    for expert in routed.call[1].unique().tolist():
        if moved := _refit_expert(module, stream, expert, routed=routed, reader=reader, floor=floor):
            error -= moved.gain
            ridges.append(moved.ridge)
    before, after = (value / max(held_out.tokens, 1) for value in (held_out.error, error))
    return ExpertRefit(before=before, after=after, ridge=statistics.median_low(ridges) if ridges else None)


def _rows(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return rows of states, which may lie on another device than their indices."""
    return states[rows.to(states.device)]


class _Moved(NamedTuple):
    """The held-out error that moving the weight of an expert removes, and its lambda."""

    gain: float
    ridge: float


def _refit_expert(
    module: nn.Module, stream: ResidualStream, expert: int, *, routed: _Routed, reader: _DownInputs, floor: float
) -> _Moved | None:
    """Move the last weight of an expert, and the stream with it; None if nothing is gained, or it has no weight."""
    fitted, held_out = RegressionSums(floor), RegressionSums(floor)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    name, dim = "", 1
    for tokens, states, gates in routed.parts_of(expert):
        if read := reader.read(expert, stream.on_device(states)):
            name, dim, inputs = read
            inputs = inputs.float() * gates
            routed.add(fitted, held_out, tokens, inputs)
            kept.append((tokens, stream.put(inputs)))
    if not fitted.tokens or not held_out.tokens:
        return None
    ridge, gain = best_ridge(fitted, held_out)
    if not gain > 0:
        return None
    change = (fitted + held_out).solve(ridge)
    weight = module.get_parameter(name).data[expert]
    weight.add_((change if dim == 1 else change.T).to(weight))
    for tokens, inputs in kept:
        routed.behind[tokens.to(routed.behind.device)] += (stream.on_device(inputs) @ change).to(routed.behind)
    return _Moved(gain, ridge)


def _collect(
    stream: ResidualStream, layer: int, module: nn.Module, targets: list[torch.Tensor], *, factor: float
) -> _Routed:
    """Run a layer on every batch; return what its experts are called with and the stream behind it, by token.

    Each of several processes gets the tokens of all: experts are fitted one after the other.
    """
    calls: list[TopKCall] = []
    tokens: list[torch.Tensor] = []
    behind: list[torch.Tensor] = []
    is_held_out: list[torch.Tensor] = []
    gates_inputs = False

    def note(_: nn.Module, args: Any, kwargs: Any, __: Any) -> None:
        nonlocal gates_inputs
        call, inputs = top_k_call(args, kwargs), gated_inputs(args, kwargs, stack_sizes(module)[0])
        if call is not None:
            token = torch.arange(len(call[1]), device=call[1].device)
        else:
            assert inputs is not None  # as when the module was found
            expert, token = inputs.any(-1).nonzero(as_tuple=True)
            call = inputs[expert, token], expert[:, None], inputs.new_ones(len(expert), 1)
            gates_inputs = True
        states, index, gates = call
        calls.append((stream.put(states.flatten(0, -2)), index, gates))
        tokens.append(token)

    with forward_hooks([(module, note)], with_kwargs=True):
        for batch, hidden in enumerate(stream.hidden):
            rows = stream.run(layer, batch, hidden).flatten(0, -2)
            tokens[-1] += sum(len(part) for part in behind)
            behind.append(stream.put(rows.float()))
            is_held_out.append(torch.full((len(rows),), batch % HELD_OUT == HELD_OUT - 1, device=rows.device))
    read, index, gates = zip(*calls, strict=True)
    return _Routed(
        call=(stream.join(list(read)), gathered(torch.cat(index)), factor * gathered(torch.cat(gates))),
        token=gathered(torch.cat(tokens) + rank() * sum(len(part) for part in behind)),
        gates_inputs=gates_inputs,
        target=stream.join([stream.put(target.flatten(0, -2).float()) for target in targets]),
        behind=stream.join(behind),
        is_held_out=gathered(torch.cat(is_held_out)),
    )


class _DownInputs:
    """Reader of the inputs of the last weight that an expert computes with."""

    def __init__(self, model: PreTrainedModel, module: nn.Module, *, gates_inputs: bool):
        compute = native_compute(model)
        self.module, self.gates_inputs = module, gates_inputs
        self.tensors = {name: compute.convert(parameter) for name, parameter in module.named_parameters()}

    def read(self, expert: int, rows: torch.Tensor) -> tuple[str, int, torch.Tensor] | None:
        """Return the name of the weight, its dim that is summed over, and the inputs, for rows of hidden states.

        Returns:
            None for an expert without weights.
        """
        reads: list[tuple[str, int, torch.Tensor]] = []
        readers = Readers(lambda name, dim, inputs: reads.append((name, dim, inputs)))
        for name, tensor in self.tensors.items():
            readers.register(name, tensor)

        def run(*arguments: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = functional_call(self.module, self.tensors, arguments)
            return output

        with readers:
            if self.gates_inputs:
                every = rows.new_zeros(stack_sizes(self.module)[0], *rows.shape)
                every[expert] = rows
                run(every.flatten(0, 1))
            else:
                one_each(run, rows, torch.full((len(rows), 1), expert, device=rows.device), rows.new_ones(len(rows), 1))
        if not reads:
            return None
        name, dim, inputs = reads[-1]
        start = expert * len(rows) if self.gates_inputs else 0
        return name, dim, inputs[start : start + len(rows)]

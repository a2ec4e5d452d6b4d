"""Gradients of the calibration loss, one block of the model at a time.

The forward pass keeps only what each block (a decoder layer) was called with. The backward pass visits the blocks from
last to first: it runs the block again, now with gradients, hands out those of its weights and drops them. What lies
between blocks is an ordinary autograd graph, so any decoder, encoder-decoder or mixture works. Memory is that of the
weights, one block's gradients, the inputs of the blocks, and the logits. Where the inputs of the blocks for the whole
calibration set would need more than the gradients of all weights, the passes take it part by part, and the gradients
add up: memory is then bounded by the model, whatever the number of tokens.

Weights are converted block by block (:class:`llm_pruner.models.blockwise.Compute`): memory-mapped bfloat16 weights are
upcast to float32, and a model larger than memory needs no more of it than one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import PrunerError
from ..models.blockwise import Compute, StandIns, native_compute
from ..models.inputs import Inputs, reads_text_only, tokens_per_sample
from ..models.processes import averaged, mean_of, own_share, rank
from ..models.running import evaluating, main_output, model_inputs, target_ids, without_cache
from ..models.tasks import predicts_tokens
from ..progress import Step, track
from ..unfinished import NOTHING_KEPT, Unfinished
from .linear_gradients import LinearGradients, MomentSums, VisitMoments, add_sample
from .token_loss import NextTokenLoss

Visit = Callable[[str, torch.Tensor, torch.Tensor], None]
TOKENS_PER_PASS = 1024  # in a forward pass
LEAST_TAPES = 2 << 30  # bytes of tapes that there is always room for


class _Gradients:
    """Receiver of the gradients of a mean loss, in fp32, once all batches have passed a block."""

    linears: LinearGradients | None = None

    def __init__(self, visit: Visit):
        self._visit = visit
        self._sums: dict[str, torch.Tensor] = {}  # of earlier parts of the calibration set

    def after_batch(self, tensors: dict[str, torch.Tensor]) -> None:
        """Let the gradients of a block's tensors add up over batches."""

    def after_block(self, tensors: dict[str, torch.Tensor], *, last: bool) -> None:
        for name, weight, gradient in _take_gradients(tensors):
            if name in self._sums:
                gradient += self._sums.pop(name)
            if last:
                self._visit(name, weight, averaged(gradient))
            else:
                self._sums[name] = gradient

    def state(self) -> dict[str, torch.Tensor]:
        """Return the sums of earlier parts, for :meth:`restore`."""
        return dict(self._sums)

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self._sums = dict(state)


class _Squares:
    """Receiver of the gradients of each sample's own mean loss, whose moments it hands on.

    Attributes:
        linears: receives those of linear layers from passes of several samples; None for passes of one sample.
    """

    def __init__(self, visit: VisitMoments, samples: int, *, with_mean: bool, linears: LinearGradients | None = None):
        self._visit, self._samples, self._with_mean, self.linears = visit, samples, with_mean, linears
        self._sums: dict[str, MomentSums] = {} if linears is None else linears.sums

    def after_batch(self, tensors: dict[str, torch.Tensor]) -> None:
        if self.linears is None:
            for name, _, gradient in _take_gradients(tensors):
                add_sample(self._sums, name, gradient, with_mean=self._with_mean)

    def after_block(self, tensors: dict[str, torch.Tensor], *, last: bool) -> None:
        if not last:
            return
        if self.linears is not None:
            received = self.linears.received()
            tensors = {name: tensor for name, tensor in tensors.items() if name in received}
        for name, tensor in _projections_first(tensors):
            sums = self._sums.pop(name, None) or MomentSums.zeros(tensor.detach(), with_mean=self._with_mean)
            self._visit(name, tensor.detach().float(), sums.moments(self._samples))

    def state(self) -> dict[str, torch.Tensor]:
        """Return the sums of earlier parts, for :meth:`restore`."""
        return {key: tensor for name, sums in self._sums.items() for key, tensor in sums.state(name).items()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self._sums |= MomentSums.restored(state)  # in place: the sums of linear layers are their receiver's


def _take_gradients(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield names, tensors and gradients in fp32; remove the gradients."""
    for name, tensor in _projections_first(tensors):
        gradient, tensor.grad = tensor.grad, None
        if gradient is None:  # the loss does not depend on it
            gradient = torch.zeros_like(tensor)
        yield name, tensor.detach().float(), gradient.float()


def _projections_first(tensors: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    """Return tensors by name as their gradients come, so that the first gradient that is not finite is named."""
    return sorted(reversed(tensors.items()), key=lambda pair: pair[1].ndim < 2)


def visit_gradients(
    model: nn.Module,
    names: Iterable[str],
    ids: Inputs,
    visit: Visit,
    *,
    compute: Compute | None = None,
    unfinished: Unfinished = NOTHING_KEPT,
) -> float:
    """Visit gradients of the mean token loss: ``visit(name, weight, gradient)`` in fp32 for every named parameter.

    Args:
        names: names of parameters.
        ids: LongTensor ``[samples, tokens]``, or other inputs.
        compute: where and how to compute; by default where the model is.
        unfinished: keeps the sums of the parts that are done, and has those of a run that was stopped.

    Returns the loss. The model's own parameters, flags, gradients and mode are not touched.

    Raises:
        PrunerError: the loss is not finite.
    """
    compute, ids = compute or native_compute(model), own_share(ids)
    batches = _batches(ids, compute)
    shares = [len(batch) / len(ids) for batch in batches]
    losses = _Sweep(model, set(names), compute, _Gradients(visit)).run(batches, shares, unfinished=unfinished)
    return mean_of(sum(loss * share for loss, share in zip(losses, shares, strict=True)))


def visit_moments(
    model: nn.Module,
    names: Iterable[str],
    ids: Inputs,
    visit: VisitMoments,
    *,
    with_mean: bool = False,
    compute: Compute | None = None,
    unfinished: Unfinished = NOTHING_KEPT,
) -> None:
    """Visit moments of the gradients of each sample's own mean loss: ``visit(name, weight, moments)`` in fp32.

    Gradients of linear layers come from passes of several samples: that of one sample is the product of its own
    activations and output gradients (as in per-sample clipping, arXiv 1510.01799). Other parameters take a pass per
    sample, and those outside the blocks a whole sweep, since there gradients add up.

    Args:
        names, ids, compute: as in :func:`visit_gradients`.
        unfinished: as there, for gradients that come from passes of several samples.
        with_mean: visit the mean of the gradients as well as that of their squares.

    Raises:
        PrunerError: the loss of a sample is not finite.
    """
    compute, ids = compute or native_compute(model), own_share(ids)
    samples = len(ids)
    receiver = partial(_Squares, visit, samples, with_mean=with_mean)
    outside = set(names) & StandIns(model, lambda _, tensor: tensor).names()
    inside = set(names) - outside
    linears = LinearGradients(model, inside, with_mean=with_mean)
    if samples > 1 and linears.candidates:
        batches = _batches(ids, compute)
        shares = [float(len(batch)) for batch in batches]  # each sample counts as if it were alone
        sweep = _Sweep(model, linears.candidates, compute, receiver(linears=linears))
        sweep.run(batches, shares, unfinished=unfinished)
        inside -= linears.received()
    single = list(ids.to(compute.device).split(1))
    if inside:
        _Sweep(model, inside, compute, receiver()).run(single, [1.0] * samples)
    if outside:
        sweep = _Sweep(model, outside, compute, receiver())
        for batch in track(single, "scoring outside the layers, by samples"):
            sweep.run([batch], [1.0], last=batch is single[-1])


def _batches(ids: Inputs, compute: Compute) -> list[Any]:
    return list(ids.to(compute.device).split(max(1, TOKENS_PER_PASS // tokens_per_sample(ids))))


@dataclass
class _Call:
    """Arguments of a block, and its outputs as leaves of the autograd graph behind it."""

    path: str
    args: Any
    kwargs: Any
    outputs: list[Any]

    def backward(self, forward: Callable[..., Any]) -> None:
        """Run the block again and pass the gradients of its outputs on to its weights and inputs."""
        has_gradient = [isinstance(leaf, torch.Tensor) and leaf.grad is not None for leaf in self.outputs]
        if not any(has_gradient):
            return
        inputs: list[tuple[torch.Tensor, torch.Tensor]] = []

        def detach(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or not value.requires_grad:
                return value
            inputs.append((value, value.detach().requires_grad_()))
            return inputs[-1][1]

        args, kwargs = tree_map(detach, (self.args, self.kwargs))
        with torch.enable_grad():
            outputs = tree_leaves(forward(*args, **kwargs))
        triples = zip(outputs, self.outputs, has_gradient, strict=True)
        pairs = [(output, leaf.grad) for output, leaf, has in triples if has and output.requires_grad]
        if pairs:
            torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
        onward = [(value, leaf.grad) for value, leaf in inputs if leaf.grad is not None]
        if onward:
            # What lies between blocks may lead to several of them, as from an encoder to all layers of a decoder.
            values, gradients = [value for value, _ in onward], [gradient for _, gradient in onward]
            torch.autograd.backward(values, gradients, retain_graph=True)


class _Sweep:
    """Forward passes of all batches, then one backward pass through the blocks with all of them.

    Attributes:
        names: parameters whose gradients the receiver is given.
        tapes: calls of blocks, in order, one tape per batch.
        paths: the blocks that every batch calls, in order.
        most: bytes of tapes that there is room for.
        drawn: random projections so far, which seed the next.
        forwards: each block's own forward, by its path.
    """

    def __init__(self, model: nn.Module, names: set[str], compute: Compute, receiver: _Gradients | _Squares):
        self.model, self.names, self.receiver = model, names, receiver
        self.linears, self.device = receiver.linears, compute.device

        def stand_in(name: str, tensor: torch.Tensor) -> torch.Tensor:
            converted = compute.convert(tensor)
            return converted.requires_grad_(True) if name in names and self.linears is None else converted

        self.stand_ins = StandIns(model, stand_in)
        self.tapes: list[list[_Call]] = []
        self.paths: list[str] = []
        self.most = max(LEAST_TAPES, 4 * sum(p.numel() for name, p in model.named_parameters() if name in names))
        self.drawn = rank() << 20  # each process draws others
        self.forwards: dict[str, Callable[..., Any]] = {}

    def run(
        self, batches: list[Any], shares: list[float], *, last: bool = True, unfinished: Unfinished = NOTHING_KEPT
    ) -> list[float]:
        """Return the mean loss of every batch; gradients are those of the losses times their shares.

        Args:
            last: False if gradients of more batches will follow in another run.
            unfinished: keeps what earlier parts of the batches have given.
        """
        pairs, losses = list(zip(batches, shares, strict=True)), list[float]()
        hooks = nullcontext() if self.linears is None else self.linears.hooked()
        with evaluating(self.model), self.stand_ins.placed() as rest, hooks:
            outside = {name: tensor for name, tensor in rest.items() if name in self.names}
            if kept := unfinished.read():
                losses += kept.record
                self._restore(kept.tensors, outside)
            while len(losses) < len(pairs):
                losses += self._forward_part(pairs[len(losses) :])
                self._backward(everywhere=bool(outside), last=last and len(losses) == len(pairs))
                if len(losses) < len(pairs) and unfinished.due:
                    gradients = {name: tensor.grad for name, tensor in outside.items() if tensor.grad is not None}
                    unfinished.write(self.receiver.state() | gradients, losses)
            self.receiver.after_batch(outside)
            if last:
                self.receiver.after_block(outside, last=True)
        return losses

    def _restore(self, state: dict[str, torch.Tensor], outside: dict[str, torch.Tensor]) -> None:
        """Go on from the state of earlier parts, and the gradients of tensors outside the blocks."""
        for name in outside.keys() & state.keys():
            outside[name].grad = state.pop(name).to(outside[name])
        self.receiver.restore({name: tensor.to(self.device) for name, tensor in state.items()})

    def _forward_part(self, pairs: list[tuple[Inputs, float]]) -> list[float]:
        """Run batches, all or as many as there is room for their tapes; return their losses."""
        losses: list[float] = []
        with self.stand_ins.forwards(self._record), torch.enable_grad():
            for pair in track(pairs, "scoring, forward passes"):
                losses.append(self._forward(*pair))
                if (len(losses) + 1) * _bytes(self.tapes[-1]) > self.most:
                    break
        return losses

    def _forward(self, ids: Inputs, share: float) -> float:
        """Run one batch; leave a tape of its blocks and the gradients of what follows the last of them."""
        self.tapes.append([])
        if self.linears is not None:
            self.linears.begin_batch(len(ids))
        inputs = model_inputs(self.model, ids)
        output = main_output(self.model(**inputs, **without_cache(self.model)))
        if not output.requires_grad:
            raise PrunerError("the model's output does not depend on its layers")
        if predicts_tokens(self.model) and reads_text_only(self.model):
            loss, _ = NextTokenLoss.apply(output.clone() if output._is_view() else output, target_ids(inputs))
        else:
            rows = output.split(len(output) if self.linears is None else 1)
            loss = torch.stack([_random_projection(row, seed=self.drawn + i) for i, row in enumerate(rows, 1)]).mean()
            self.drawn += len(rows)
        if not torch.isfinite(loss):
            raise PrunerError(f"the calibration loss is {loss.item()}; load the model with --dtype float32 or bfloat16")
        (loss * share).backward(retain_graph=True)
        return loss.item()

    def _record(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a forward that records the call of a block instead of an autograd graph."""
        self.forwards[path] = forward

        def run(*args: Any, **kwargs: Any) -> Any:
            if self.linears is not None:
                _begin_graph(args, kwargs)
            with self.stand_ins.placed(path), torch.no_grad():
                output = forward(*args, **kwargs)
            output = tree_map(_leaf, output)
            self.tapes[-1].append(_Call(path, args, kwargs, tree_leaves(output)))
            return output

        return run

    def _backward(self, *, everywhere: bool, last: bool) -> None:
        """Go through the blocks from last to first: through all, or as long as an earlier one has named parameters.

        Args:
            last: no more batches follow.
        """
        self.paths = paths = self.paths or [call.path for call in self.tapes[0]]
        if any([call.path for call in tape] != paths for tape in self.tapes):
            raise PrunerError("the model runs other blocks for other samples: Taylor does not know how to add up")
        first = next((i for i, path in enumerate(paths) if everywhere or self.names & self.stand_ins.names(path)), None)
        visited = [] if first is None else paths[first:]
        with Step("scoring, backward passes of layers", len(visited) * len(self.tapes)) as step:
            for path in reversed(visited):
                self._backward_block(path, step, last=last)
        self.tapes = []

    def _backward_block(self, path: str, step: Step, *, last: bool) -> None:
        with self.stand_ins.placed(path) as tensors:
            named = {name: tensor for name, tensor in tensors.items() if name in self.names}
            for tape in self.tapes:
                tape.pop().backward(self.forwards[path])
                self.receiver.after_batch(named)
                step.advance()
            self.receiver.after_block(named, last=last)


def _bytes(tape: list[_Call]) -> int:
    """Return the memory of the tensors on a tape."""
    tensors = (v for v in tree_leaves([(c.args, c.kwargs, c.outputs) for c in tape]) if isinstance(v, torch.Tensor))
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _begin_graph(*arguments: Any) -> None:
    """Let the first floating-point argument of a block require gradients, so that all its layers receive some."""
    floating = (v for v in tree_leaves(arguments) if isinstance(v, torch.Tensor) and v.is_floating_point())
    if (first := next(floating, None)) is not None and not first.requires_grad:
        first.requires_grad_()


def _leaf(value: Any) -> Any:
    differentiable = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().requires_grad_() if differentiable else value


def _random_projection(output: torch.Tensor, seed: int) -> torch.Tensor:
    """Return the mean over samples of an output's projection onto random directions: a loss that needs no labels.

    With v ~ N(0, I) and n values per sample, the mean square of the gradient of <v, output> / sqrt(n) is the diagonal
    of the Gauss-Newton matrix of half the mean squared distance to the output: how far the output moves when a weight
    does (Hutchinson's estimator). That distance itself has no gradient at the original.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(output.shape, generator=generator).to(output.device)
    return (output.float() * directions).sum() / len(output) / output[0].numel() ** 0.5

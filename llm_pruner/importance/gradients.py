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
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import PrunerError
from ..models.blockwise import Compute, StandIns, native_compute
from ..models.inputs import Inputs, reads_text_only, tokens_per_sample
from ..models.processes import averaged, mean_of, own_share, rank
from ..models.running import evaluating, main_output, model_inputs, target_ids, without_cache
from ..models.tasks import predicts_tokens
from ..models.torch_internals import tree_leaves, tree_map
from ..progress import Step, track
from ..unfinished import NOTHING_KEPT, Kept, Unfinished
from .linear_gradients import LinearGradients, MomentSums, VisitMoments, add_sample
from .tape import Call, Tape, begin_graph, bytes_of, leaf, output_gradients, restore_output_gradients
from .token_loss import NextTokenLoss

Visit = Callable[[str, torch.Tensor, torch.Tensor], None]
Results = dict[str, torch.Tensor]
TOKENS_PER_PASS = 1024  # in a forward pass
RESULT = "result "  # begins the names of results among what is kept
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
    results: Results | None = None,
) -> float:
    """Visit gradients of the mean token loss: ``visit(name, weight, gradient)`` in fp32 for every named parameter.

    Args:
        names: names of parameters.
        ids: LongTensor ``[samples, tokens]``, or other inputs.
        compute: where and how to compute; by default where the model is.
        unfinished: keeps what is done, block by block, and has what a run that was stopped had done.
        results: what ``visit`` has put there is kept too, and put there again.

    Returns the loss. The model's own parameters, flags, gradients and mode are not touched.

    Raises:
        PrunerError: the loss is not finite.
    """
    compute, ids = compute or native_compute(model), own_share(ids)
    batches = _batches(ids, compute)
    shares = [len(batch) / len(ids) for batch in batches]
    sweep = _Sweep(model, set(names), compute, _Gradients(visit))
    losses = sweep.run(batches, shares, unfinished=unfinished, results=results)
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
    results: Results | None = None,
) -> None:
    """Visit moments of the gradients of each sample's own mean loss: ``visit(name, weight, moments)`` in fp32.

    Gradients of linear layers come from passes of several samples: that of one sample is the product of its own
    activations and output gradients (as in per-sample clipping, arXiv 1510.01799). Other parameters take a pass per
    sample, and those outside the blocks a whole sweep, since there gradients add up.

    Args:
        names, ids, compute: as in :func:`visit_gradients`.
        unfinished, results: as there, for gradients that come from passes of several samples.
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
        sweep.run(batches, shares, unfinished=unfinished, results=results)
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
        self.tapes: list[Tape] = []
        self.paths: list[str] = []
        self.most = max(LEAST_TAPES, 4 * sum(p.numel() for name, p in model.named_parameters() if name in names))
        self.drawn = rank() << 20  # each process draws others
        self.forwards: dict[str, Callable[..., Any]] = {}

    def run(
        self,
        batches: list[Any],
        shares: list[float],
        *,
        last: bool = True,
        unfinished: Unfinished = NOTHING_KEPT,
        results: Results | None = None,
    ) -> list[float]:
        """Return the mean loss of every batch; gradients are those of the losses times their shares.

        Args:
            last: False if gradients of more batches will follow in another run.
            unfinished: keeps what is done, in the middle of a part of the batches too.
            results: of the visits, kept with it.
        """
        results = {} if results is None else results
        pairs, losses = list(zip(batches, shares, strict=True)), list[float]()
        hooks = nullcontext() if self.linears is None else self.linears.hooked()
        with evaluating(self.model), self.stand_ins.placed() as rest, hooks:
            outside = {name: tensor for name, tensor in rest.items() if name in self.names}
            kept = unfinished.read()
            if kept:
                losses += kept.record["losses"]
                self.drawn += sum(map(self._draws, batches[: len(losses)]))
            while len(losses) < len(pairs):
                part = self._forward_part(pairs[len(losses) :])
                done = self._restore(kept, outside, results) if kept else 0
                kept = None
                ends = last and len(losses) + len(part) == len(pairs)
                for blocks in self._backward(done, everywhere=bool(outside), last=ends):
                    if unfinished.due:
                        unfinished.write(self._state(outside, results), {"losses": losses, "blocks": blocks})
                losses += part
            self.receiver.after_batch(outside)
            if last:
                self.receiver.after_block(outside, last=True)
        return losses

    def _state(self, outside: dict[str, torch.Tensor], results: Results) -> dict[str, torch.Tensor]:
        """Return all that the backward pass has given so far, in this part of the batches and earlier ones."""
        gradients = {name: tensor.grad for name, tensor in outside.items() if tensor.grad is not None}
        found = {f"{RESULT}{name}": tensor for name, tensor in results.items()}
        return self.receiver.state() | gradients | found | output_gradients(self.tapes)

    def _restore(self, kept: Kept, outside: dict[str, torch.Tensor], results: Results) -> int:
        """Go on from a state, after the forward pass of the same part; return the number of blocks that are done."""
        state = kept.tensors
        for name, tensor in outside.items():
            tensor.grad = state.pop(name).to(tensor) if name in state else None
        results |= {name.removeprefix(RESULT): state.pop(name) for name in list(state) if name.startswith(RESULT)}
        for tape in self.tapes:
            del tape[len(tape) - kept.record["blocks"] :]
        restore_output_gradients(self.tapes, state)
        self.receiver.restore({name: tensor.to(self.device) for name, tensor in state.items()})
        return kept.record["blocks"]

    def _forward_part(self, pairs: list[tuple[Inputs, float]]) -> list[float]:
        """Run batches, all or as many as there is room for their tapes; return their losses."""
        losses: list[float] = []
        with self.stand_ins.forwards(self._record), torch.enable_grad():
            for pair in track(pairs, "scoring, forward passes"):
                losses.append(self._forward(*pair))
                if (len(losses) + 1) * bytes_of(self.tapes[-1]) > self.most:
                    break
        self.paths = self.paths or [call.path for call in self.tapes[0]]
        if any([call.path for call in tape] != self.paths for tape in self.tapes):
            raise PrunerError("the model runs other blocks for other samples: Taylor does not know how to add up")
        return losses

    def _draws(self, ids: Inputs) -> int:
        """Return how many random projections a batch draws."""
        return 1 if self.linears is None else len(ids)

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
            rows = output.chunk(self._draws(ids))
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
                begin_graph(args, kwargs)
            with self.stand_ins.placed(path), torch.no_grad():
                output = forward(*args, **kwargs)
            output = tree_map(leaf, output)
            self.tapes[-1].append(Call(path, args, kwargs, tree_leaves(output)))
            return output

        return run

    def _backward(self, done: int, *, everywhere: bool, last: bool) -> Iterator[int]:
        """Go through the blocks from last to first: through all, or as long as an earlier one has named parameters.

        Yields how many are done after each, and forgets the tapes at the end.

        Args:
            done: so many of the last blocks are, and are no longer on the tapes.
            last: no more batches follow.
        """
        named = (i for i, path in enumerate(self.paths) if everywhere or self.names & self.stand_ins.names(path))
        visited = self.paths[next(named, len(self.paths)) :][::-1]
        with Step("scoring, backward passes of layers", len(visited) * len(self.tapes)) as step:
            step.advance(done * len(self.tapes))
            for i, path in enumerate(visited[done:], done + 1):
                self._backward_block(path, step, last=last)
                yield i
        self.tapes = []

    def _backward_block(self, path: str, step: Step, *, last: bool) -> None:
        with self.stand_ins.placed(path) as tensors:
            named = {name: tensor for name, tensor in tensors.items() if name in self.names}
            for tape in self.tapes:
                tape.pop().backward(self.forwards[path])
                self.receiver.after_batch(named)
                step.advance()
            self.receiver.after_block(named, last=last)


def _random_projection(output: torch.Tensor, seed: int) -> torch.Tensor:
    """Return the mean over samples of an output's projection onto random directions: a loss that needs no labels.

    With v ~ N(0, I) and n values per sample, the mean square of the gradient of <v, output> / sqrt(n) is the diagonal
    of the Gauss-Newton matrix of half the mean squared distance to the output: how far the output moves when a weight
    does (Hutchinson's estimator). That distance itself has no gradient at the original.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(output.shape, generator=generator).to(output.device)
    return (output.float() * directions).sum() / len(output) / output[0].numel() ** 0.5

"""Gradients of the calibration loss, one block of the model at a time.

The forward pass keeps only what each block (a decoder layer) was called with. The backward pass visits the blocks from
last to first: it runs the block again, now with gradients, hands out those of its weights and drops them. What lies
between blocks is an ordinary autograd graph, so any decoder, encoder-decoder or mixture works. Memory is that of the
weights, one block's gradients, the inputs of the blocks, and the logits.

Weights can be converted block by block (see :class:`llm_pruner.graph.Compute`): bfloat16 weights mapped from files
are computed with in float32, and a model larger than memory needs no more of it than one of its blocks.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import PrunerError
from ..models.blockwise import Compute, StandIns, native_compute
from ..models.running import evaluating, model_inputs, target_ids

Visit = Callable[[str, torch.Tensor, torch.Tensor], None]
TOKENS_PER_PASS = 1024  # in a forward pass


def visit_gradients(
    model: nn.Module,
    wanted: Iterable[str],
    ids: torch.Tensor,
    visit: Visit,
    done: Callable[[str, torch.Tensor], None] = lambda *_: None,
    per_sample: bool = False,
    compute: Compute | None = None,
) -> float:
    """Gradients of the mean token loss: ``visit(name, weight, gradient)`` in fp32 for every wanted parameter.

    Args:
        wanted: names of parameters.
        ids: LongTensor ``[samples, tokens]``.
        done: called with a name and weight when all gradients of a parameter have been visited.
        per_sample: visit the gradient of every sample's own mean loss, one by one, instead of the one of them all.
        compute: where and how to compute; by default where the model is.

    Returns the loss. The model's own parameters, flags, gradients and mode are not touched.

    Raises:
        PrunerError: the loss is not finite.
    """
    _return_freed_memory()
    compute = compute or native_compute(model)
    wanted = set(wanted)
    rows = 1 if per_sample else max(1, TOKENS_PER_PASS // ids.shape[1])
    batches = list(ids.to(compute.device).split(rows))
    shares = [1.0 if per_sample else len(batch) / len(ids) for batch in batches]
    # Gradients of what lies outside the blocks add up over a whole pass: there, every sample needs one of its own.
    rest = wanted & StandIns(model, lambda _, tensor: tensor).names() if per_sample else set()
    losses = []
    if wanted - rest or not rest:
        losses = _Sweep(model, wanted - rest, compute, visit, done, per_sample).run(batches, shares)
    if rest:
        sweep = _Sweep(model, rest, compute, visit, lambda *_: None, per_sample)
        losses = [sweep.run([batch], [1.0])[0] for batch in batches]
        named = dict(model.named_parameters())
        for name in rest:
            done(name, compute.convert(named[name]).float())
    return sum(loss * len(batch) for loss, batch in zip(losses, batches, strict=True)) / len(ids)


@dataclass
class _Call:
    """What a block was called with, and its outputs as leaves of the graph that follows."""

    path: str
    args: Any
    kwargs: Any
    outputs: list[Any]

    def backward(self, forward: Callable[..., Any]) -> None:
        """Run the block again and pass the gradients of its outputs on to its weights and inputs."""
        arrived = [isinstance(leaf, torch.Tensor) and leaf.grad is not None for leaf in self.outputs]
        if not any(arrived):
            return
        inputs: list[tuple[torch.Tensor, torch.Tensor]] = []

        def detached(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or not value.requires_grad:
                return value
            inputs.append((value, value.detach().requires_grad_()))
            return inputs[-1][1]

        args, kwargs = tree_map(detached, (self.args, self.kwargs))
        with torch.enable_grad():
            out = tree_leaves(forward(*args, **kwargs))
        pairs = [(o, leaf.grad) for o, leaf, here in zip(out, self.outputs, arrived, strict=True) if here]
        pairs = [(o, gradient) for o, gradient in pairs if o.requires_grad]
        if pairs:
            torch.autograd.backward([o for o, _ in pairs], [gradient for _, gradient in pairs])
        onward = [(value, leaf.grad) for value, leaf in inputs if leaf.grad is not None]
        if onward:
            # What lies between blocks may lead to several of them, as from an encoder to all layers of a decoder.
            values, gradients = [value for value, _ in onward], [gradient for _, gradient in onward]
            torch.autograd.backward(values, gradients, retain_graph=True)


class _Sweep:
    """Forward passes of all batches, then one backward pass through the blocks with all of them."""

    def __init__(
        self,
        model: nn.Module,
        wanted: set[str],
        compute: Compute,
        visit: Visit,
        done: Callable[[str, torch.Tensor], None],
        per_sample: bool,
    ):
        self.model, self.wanted, self.visit, self.done, self.per_sample = model, wanted, visit, done, per_sample
        self.stand_ins = StandIns(
            model,
            lambda name, tensor: (
                compute.convert(tensor).requires_grad_(True) if name in wanted else compute.convert(tensor)
            ),
        )
        self.tapes: list[list[_Call]] = []
        self.original: dict[str, Callable[..., Any]] = {}

    def run(self, batches: list[torch.Tensor], shares: list[float]) -> list[float]:
        """The mean loss of every batch; gradients are those of the losses times their shares."""
        self.tapes = []
        with evaluating(self.model), self.stand_ins.placed() as rest:
            with self.stand_ins.forwards(self._recorded), torch.enable_grad():
                losses = [self._forward(*pair) for pair in zip(batches, shares, strict=True)]
            left = [call.path for call in self.tapes[0]]
            if any([call.path for call in tape] != left for tape in self.tapes):
                raise PrunerError("the model runs other blocks for other samples: Taylor does not know how to add up")
            outside = self.wanted & rest.keys()
            while left and (outside or any(self.wanted & self.stand_ins.names(path) for path in left)):
                self._block(left.pop())
            self.tapes = []
            self._visit({name: rest[name] for name in outside})
            for name in outside:
                self.done(name, rest[name].detach().float())
        return losses

    def _forward(self, ids: torch.Tensor, share: float) -> float:
        self.tapes.append([])
        inputs = model_inputs(self.model, ids)
        logits = self.model(**inputs, use_cache=False).logits
        if not logits.requires_grad:
            raise PrunerError("the model's output does not depend on its layers")
        loss, _ = NextTokenLoss.apply(logits.clone() if logits._is_view() else logits, target_ids(inputs))
        if not torch.isfinite(loss):
            raise PrunerError(f"the calibration loss is {loss.item()}; load the model with --dtype float32 or bfloat16")
        (loss * share).backward(retain_graph=True)
        return loss.item()

    def _recorded(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A block that leaves no graph behind but a note of its call."""
        self.original[path] = forward

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.stand_ins.placed(path), torch.no_grad():
                out = forward(*args, **kwargs)
            out = tree_map(_leaf, out)
            self.tapes[-1].append(_Call(path, args, kwargs, tree_leaves(out)))
            return out

        return run

    def _block(self, path: str) -> None:
        with self.stand_ins.placed(path) as tensors:
            wanted = {name: tensor for name, tensor in tensors.items() if name in self.wanted}
            for tape in self.tapes:
                tape.pop().backward(self.original[path])
                if self.per_sample:
                    self._visit(wanted)
            if not self.per_sample:
                self._visit(wanted)
            for name, tensor in wanted.items():
                self.done(name, tensor.detach().float())

    @torch.no_grad()
    def _visit(self, tensors: dict[str, torch.Tensor]) -> None:
        # As gradients come, projections before norms, so that the first bad one is named.
        for name, tensor in sorted(reversed(tensors.items()), key=lambda pair: pair[1].ndim < 2):
            gradient, tensor.grad = tensor.grad, None
            if gradient is None:  # the loss does not depend on it
                gradient = torch.zeros_like(tensor)
            self.visit(name, tensor.detach().float(), gradient.float())


def _leaf(value: Any) -> Any:
    known = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().requires_grad_() if known else value


class NextTokenLoss(torch.autograd.Function):
    """Mean cross entropy of tokens 1.. given those before them, in the memory of the logits.

    With a large vocabulary the logits are the largest tensor of the whole pass, and a plain cross entropy
    keeps three of them. Here their gradient, (softmax - onehot) / tokens, is written over them.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = ids.shape[0] * (ids.shape[1] - 1)
        total = torch.zeros((), dtype=torch.float64)
        for row, target in zip(logits, ids[:, 1:].to(logits.device), strict=True):  # one sample at a time in fp32
            log_probabilities = row[:-1].float().log_softmax(-1)
            total -= log_probabilities.gather(-1, target[:, None]).sum().double().cpu()
            gradient = log_probabilities.exp_()
            gradient.scatter_add_(-1, target[:, None], torch.full_like(gradient[:, :1], -1.0).expand(-1, 1))
            row[:-1] = gradient / tokens
            row[-1] = 0
        ctx.mark_dirty(logits)
        ctx.save_for_backward(logits)
        return (total / tokens).to(logits.device, torch.float32), logits

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (logits_gradient,) = ctx.saved_tensors
        return logits_gradient.mul_(gradients[0].to(logits_gradient.dtype)), None  # used once: nobody sees it again


def _return_freed_memory(threshold: int = 8 << 20) -> None:
    """Make glibc hand large freed tensors back to the system instead of keeping them for later.

    Left to itself it raises this threshold to the largest tensor freed so far, and the heap grows by the
    fragments: a quarter of a GiB here.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(-3, threshold)  # -3 is M_MMAP_THRESHOLD

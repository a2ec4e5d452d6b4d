"""Calls of blocks, recorded in a forward pass and run again, with gradients, in a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..models.torch_internals import tree_leaves, tree_map


@dataclass
class Call:
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


Tape = list[Call]  # of one batch, in the order of the calls


def output_gradients(tapes: list[Tape]) -> dict[str, torch.Tensor]:
    """Return the gradients that have reached the outputs of calls, for :func:`restore_output_gradients`."""
    return {place: leaf.grad for place, leaf in _outputs(tapes).items() if leaf.grad is not None}


def restore_output_gradients(tapes: list[Tape], state: dict[str, torch.Tensor]) -> None:
    """Give the outputs of calls the gradients that they had, and take these out of ``state``."""
    for place, leaf in _outputs(tapes).items():
        leaf.grad = state.pop(place).to(leaf) if place in state else None


def _outputs(tapes: list[Tape]) -> dict[str, torch.Tensor]:
    return {
        f"output {i} of call {j} of batch {k}": leaf
        for k, tape in enumerate(tapes)
        for j, call in enumerate(tape)
        for i, leaf in enumerate(call.outputs)
        if isinstance(leaf, torch.Tensor)
    }


def bytes_of(tape: Tape) -> int:
    """Return the memory of the tensors on a tape."""
    tensors = (v for v in tree_leaves([(c.args, c.kwargs, c.outputs) for c in tape]) if isinstance(v, torch.Tensor))
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def begin_graph(*arguments: Any) -> None:
    """Let the first floating-point argument of a block require gradients, so that all its layers receive some."""
    floating = (v for v in tree_leaves(arguments) if isinstance(v, torch.Tensor) and v.is_floating_point())
    if (first := next(floating, None)) is not None and not first.requires_grad:
        first.requires_grad_()


def leaf(value: Any) -> Any:
    """Return a tensor of floating-point numbers as a leaf of the autograd graph, any other value as it is."""
    differentiable = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().requires_grad_() if differentiable else value

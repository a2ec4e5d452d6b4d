"""Passes of a model without some layers, or without a block of some layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import PrunerError, in_one_line
from ..models.blockwise import Compute
from ..models.hooks import Forward, forward_hooks, replaced_forwards
from ..models.inputs import Inputs
from ..models.layers import hidden_in, hidden_out, with_hidden
from ..models.loss import has_loss, total_loss
from ..models.running import forward


@dataclass
class LayerStack:
    """A stack of layers to score.

    Attributes:
        layers: layers of one stack of the model.
        blocks: block that is scored in each layer, None where a layer has none that can go; empty: whole layers.
        fixed: indices of layers that must stay.
        batches: calibration set, split for forward passes; empty for strategies by position.
        most: largest number of layers that will go.
    """

    model: nn.Module
    layers: list[nn.Module]
    blocks: list[nn.Module | None]
    fixed: set[int]
    batches: tuple[torch.Tensor, ...]
    compute: Compute
    most: int

    @property
    def free(self) -> list[int]:
        return [i for i in range(len(self.layers)) if i not in self.fixed]

    def check_order(self, run: list[int]) -> None:
        """Refuse a model whose layers did not run once each, in order."""
        if run != list(range(len(self.layers))):
            raise PrunerError("the layers of this model do not run once each, in order: they cannot be compared")

    def silenced(self, index: int) -> AbstractContextManager[None]:
        """Let the block of a layer add nothing."""
        block = self.blocks[index]
        assert block is not None  # fixed otherwise
        return replaced_forwards([block], _adding_nothing)

    def scores(self, by_layer: dict[int, float]) -> torch.Tensor:
        """Return ``[layers]``, infinite for layers without a score."""
        scores = torch.full((len(self.layers),), torch.inf, dtype=torch.float64)
        for i, value in by_layer.items():
            scores[i] = value
        return scores

    def by_count(self, removed: Callable[[int], list[int]]) -> torch.Tensor:
        """Return ``[layers - 1, layers]``: in row n - 1, the layers ``removed(n)`` score lowest."""
        rows = []
        for count in range(1, len(self.layers)):
            lowest = removed(count)
            rows.append(self.scores({i: 0.0 if i in lowest else 1.0 for i in self.free}))
        return torch.stack(rows)


class CachedPass:
    """Forward pass of one batch whose hidden states are cached, to be repeated without some layers.

    A repeated pass begins at the first layer that goes, from the cached hidden states in front of it.

    Attributes:
        states: hidden states in front of every layer and behind the last, ``[layers + 1]`` tensors.
        joined: True if every layer reads what the one before it returns. Else a repeated pass begins at the first
            layer, since what lies between layers adds to their output.
        extras: what each layer returns, without its hidden states.
        loss: summed loss of the pass, over ``tokens`` predicted tokens; 0 for a model that predicts none.
    """

    def __init__(self, stack: LayerStack, ids: Inputs):
        self.stack, self.ids = stack, ids
        self.states: list[torch.Tensor] = []
        self.joined = True
        self.extras: list[Any] = []

        def cache(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            hidden = hidden_in(args, kwargs)
            self.joined &= not self.states or hidden.data_ptr() == self.states[-1].data_ptr()
            self.states[len(self.extras) :] = [hidden, hidden_out(output)]
            self.extras.append(with_hidden(output, None))

        with forward_hooks([(layer, cache) for layer in stack.layers], with_kwargs=True):
            self.loss, self.tokens = self._run()
        stack.check_order(list(range(len(self.extras))))

    def _run(self) -> tuple[float, int]:
        """Run the batch; return its summed loss over predicted tokens, 0 for a model that predicts none."""
        if has_loss(self.stack.model):
            return total_loss(self.stack.model, [self.ids])
        forward(self.stack.model, self.ids)
        return 0.0, 0

    @contextmanager
    def without(self, removed: set[int], start: int) -> Iterator[list[torch.Tensor]]:
        """Take layers ``removed`` out and skip those before ``start``; yield a list that the next pass fills.

        It receives the hidden states in front of each layer from ``start`` on, or from the first, and behind the last.

        Raises:
            PrunerError: the model does not run without these layers.
        """
        states: list[torch.Tensor] = []
        start = start if self.joined else 0
        try:
            with replaced_forwards(
                self.stack.layers, lambda i, forward: self._forward(i, forward, removed, start, states)
            ):
                yield states
        except (PrunerError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a layer of somebody else's model can need another in any way
            layers = ", ".join(map(str, sorted(removed)))
            raise PrunerError(
                f"the model does not run without layer {layers} ({in_one_line(error)}): give block_influence"
            ) from error

    def _forward(
        self, index: int, forward: Forward, removed: set[int], start: int, states: list[torch.Tensor]
    ) -> Forward:
        """Return what a layer runs in a repeated pass."""
        last = index == len(self.stack.layers) - 1

        def run(*args: Any, **kwargs: Any) -> Any:
            hidden = hidden_in(args, kwargs) if index >= start else self.states[start]
            if index >= start:
                states.append(hidden)
            if index in removed and self.stack.blocks:
                with self.stack.silenced(index):
                    output = forward(*args, **kwargs)
            elif index < start or index in removed:
                output = with_hidden(self.extras[index], hidden)
            else:
                output = forward(*args, **kwargs)
            if last:
                states.append(hidden_out(output))
            return output

        return run

    def loss_without(self, removed: set[int], start: int) -> float:
        """Return the summed loss without some layers, of which ``start`` is the first."""
        with self.without(removed, start):
            return self._run()[0]

    def remove(self, removed: set[int], start: int) -> None:
        """Cache the pass without some layers, for passes to come."""
        with self.without(removed, start) as states:
            self.loss, _ = self._run()
        self.states[-len(states) :] = states


def _adding_nothing(_: int, forward: Forward) -> Forward:
    """Return a forward of a block whose hidden states are zeros."""

    def run(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        return with_hidden(output, torch.zeros_like(hidden_out(output)))

    return run

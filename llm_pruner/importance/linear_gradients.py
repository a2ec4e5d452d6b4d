"""Gradients of single samples for the weights of linear layers, from passes of several samples.

For a linear layer y = W x, let x_n ``[tokens, in]`` be the activations of sample n and d_n ``[tokens, out]`` the
gradients of its loss with respect to y. The gradient of the sample is d_n' x_n, and sum_t d_nt for the bias
(Goodfellow, arXiv 1510.01799). One batched pass yields x and d of all samples; the products cost what a backward pass
spends on W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..models.hooks import forward_hooks
from ..models.processes import averaged


@dataclass(frozen=True)
class Moments:
    """Moments of the samples' gradients.

    Attributes:
        square: mean square h, the diagonal of the Fisher information.
        mean: mean g; None where only h was asked for.
    """

    square: torch.Tensor
    mean: torch.Tensor | None


VisitMoments = Callable[[str, torch.Tensor, Moments], None]


@dataclass(frozen=True)
class MomentSums:
    """Sums of the squares of gradients, and of the gradients where their mean is asked for, in fp32."""

    square: torch.Tensor
    mean: torch.Tensor | None

    @classmethod
    def zeros(cls, like: torch.Tensor, *, with_mean: bool) -> MomentSums:
        square = torch.zeros_like(like, dtype=torch.float32)
        return cls(square, torch.zeros_like(square) if with_mean else None)

    def add(self, gradient: torch.Tensor) -> None:
        """Add the gradient of one sample."""
        gradient = gradient.float()
        self.square.addcmul_(gradient, gradient)
        if self.mean is not None:
            self.mean.add_(gradient)

    def state(self, name: str) -> dict[str, torch.Tensor]:
        """Return the sums under names that begin with that of their parameter."""
        return {f"{name} square": self.square} | ({} if self.mean is None else {f"{name} mean": self.mean})

    @classmethod
    def restored(cls, state: dict[str, torch.Tensor]) -> dict[str, MomentSums]:
        """Return the sums of all parameters whose :meth:`state` is given, by their names."""
        names = [key.removesuffix(" square") for key in state if key.endswith(" square")]
        return {name: cls(state[f"{name} square"], state.get(f"{name} mean")) for name in names}

    def moments(self, samples: int) -> Moments:
        """Return the moments of so many samples of this process, and as many of each other one."""
        square = averaged(self.square.div_(samples))
        return Moments(square, None if self.mean is None else averaged(self.mean.div_(samples)))


def add_sample(sums: dict[str, MomentSums], name: str, gradient: torch.Tensor, *, with_mean: bool) -> None:
    """Add the gradient of one sample to the sums of a parameter, which begin with its first sample."""
    if name not in sums:
        sums[name] = MomentSums.zeros(gradient, with_mean=with_mean)
    sums[name].add(gradient)


@dataclass(frozen=True)
class LinearNames:
    """Linear layer: the names of its weight and bias, where their gradients are wanted, and the weight's layout."""

    weight: str | None
    bias: str | None
    rows_are_outputs: bool


class LinearGradients:
    """Receiver of the single samples' gradients of linear layers during batched passes.

    Attributes:
        candidates: parameters that may be received: weights and biases of linear layers that nothing else holds.
        sums: moments so far, of parameters whose gradients have come.
    """

    def __init__(self, model: nn.Module, names: set[str], *, with_mean: bool):
        self.sums: dict[str, MomentSums] = {}
        self._with_mean = with_mean
        self._layers = dict(linear_layers(model, names))
        self._calls: dict[nn.Module, list[bool]] = {module: [] for module in self._layers}
        self._batches = self._rows = 0

    @property
    def candidates(self) -> set[str]:
        return {name for layer in self._layers.values() for name in (layer.weight, layer.bias) if name}

    def received(self) -> set[str]:
        """Return the candidates whose layers ran once a pass, on all samples in order; known after a forward pass."""
        whole = [self._layers[module] for module, calls in self._calls.items() if self._ran_on_all(calls)]
        return {name for layer in whole for name in (layer.weight, layer.bias) if name}

    def _ran_on_all(self, calls: list[bool]) -> bool:
        return len(calls) == self._batches and all(calls)

    def begin_batch(self, rows: int) -> None:
        """Expect a forward pass of ``rows`` samples."""
        self._rows, self._batches = rows, self._batches + 1

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Watch the layers: without gradients note what they are given, with gradients receive those of samples."""
        with forward_hooks([(module, self._watch) for module in self._layers]):
            yield

    def _watch(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if not torch.is_grad_enabled():
            self._calls[module].append(args[0].ndim > 2 and len(args[0]) == self._rows)
        elif self._ran_on_all(self._calls[module]) and output.requires_grad:
            output.register_hook(partial(self._receive, self._layers[module], args[0].detach()))

    def _receive(self, layer: LinearNames, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        product: torch.Tensor | None = None  # in one place for all samples: fresh memory costs more than the product
        inputs = inputs.to(gradients.dtype)  # their product may be narrow arithmetic
        for x, d in zip(inputs.flatten(1, -2), gradients.detach().flatten(1, -2), strict=True):
            if layer.weight:
                product = torch.mm(*(d.T, x) if layer.rows_are_outputs else (x.T, d), out=product)
                self._add(layer.weight, product)
            if layer.bias:
                self._add(layer.bias, d.sum(0))

    def _add(self, name: str, gradient: torch.Tensor) -> None:
        add_sample(self.sums, name, gradient, with_mean=self._with_mean)


def linear_layers(model: nn.Module, names: set[str]) -> Iterator[tuple[nn.Module, LinearNames]]:
    """Yield linear layers that have a weight or bias of ``names``, and hold each alone."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    name_of = {id(p): name for name, p in model.named_parameters() if name in names and holders[id(p)] == 1}
    for module in model.modules():
        if type(module).forward not in (nn.Linear.forward, Conv1D.forward):
            continue
        weight, bias = name_of.get(id(module.weight)), name_of.get(id(module.bias))
        if weight or bias:
            yield module, LinearNames(weight, bias, rows_are_outputs=type(module).forward is nn.Linear.forward)

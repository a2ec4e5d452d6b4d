"""Criteria for whole layers: forward passes only.

block_influence   1 - mean_t cos(h_t, h'_t), with h what a layer is given of token t and h' what it passes on
                  (ShortGPT, arXiv 2403.03853, equation 1)
loss_change       how much the mean token loss grows when the layer passes on what it is given
                  (as in Shortened LLaMA, arXiv 2402.02834, section 3.1, with the loss for the perplexity)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from ..errors import PrunerError
from ..graph import (
    Compute,
    Unit,
    computing,
    evaluating,
    given,
    layer_lists,
    model_inputs,
    passed,
    predicted,
    total_loss,
)

TOKENS = 2048  # in a forward pass


@torch.no_grad()
def block_influence(model: nn.Module, unit: Unit, calibration: torch.Tensor, compute: Compute) -> torch.Tensor:
    """Block influence of every layer of a stack: float64 ``[layers]``, 0 for one that only scales its input."""
    layers = _layers(model, unit)
    similar, tokens = torch.zeros(len(layers), dtype=torch.float64), 0

    def hook(index: int) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before, after = given(args, kwargs), passed(output)
            similar[index] += cosine_similarity(before.double(), after.double(), dim=-1).sum().cpu()

        return look

    handles = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        with evaluating(model), computing(model, compute):
            for ids in _batches(calibration, compute):
                inputs = model_inputs(model, ids)
                model(**inputs, use_cache=False)
                of_stack = inputs["input_ids"] if unit.name.startswith("encoder") else predicted(inputs)
                tokens += of_stack.numel()
    finally:
        for handle in handles:
            handle.remove()
    return 1 - similar / tokens


@torch.no_grad()
def loss_change(model: nn.Module, unit: Unit, calibration: torch.Tensor, compute: Compute) -> torch.Tensor:
    """Change of the mean token loss, in nats, without each layer of a stack: float64 ``[layers]``."""
    layers = _layers(model, unit)

    def skip(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = given(args, kwargs)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def loss() -> float:
        total, tokens = total_loss(model, _batches(calibration, compute))
        return total / tokens

    out = torch.zeros(len(layers), dtype=torch.float64)
    with evaluating(model), computing(model, compute):
        whole = loss()
        for i, layer in enumerate(layers):
            handle = layer.register_forward_hook(skip, with_kwargs=True)
            try:
                out[i] = loss() - whole
            finally:
                handle.remove()
    return out


def _layers(model: nn.Module, unit: Unit) -> list[nn.Module]:
    if unit.kind != "layers":
        raise PrunerError(f"{unit.name} is no stack of layers: score it with another criterion")
    return list(layer_lists(model)[unit.name.removesuffix(".layers")])


def _batches(calibration: torch.Tensor, compute: Compute) -> tuple[torch.Tensor, ...]:
    return calibration.to(compute.device).split(max(1, TOKENS // calibration.shape[1]))

"""Parts that the trainings of a refit share: batches, the schedule, float32 copies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.inputs import Inputs, tokens_per_sample

BETAS = (0.9, 0.95)  # of Adam: the second moment forgets soon, since trainings have few steps
USUAL_WIDTH = 512
WARMUP = 0.05  # share of the budget in which the learning rate rises


def rate_for(model: PreTrainedModel, rate: float) -> float:
    """Return the peak learning rate of a model: ``rate`` up to 512 hidden channels, and less for more.

    Adam moves every weight by about the learning rate, and outputs by that times the number of inputs (Yang et al.,
    arXiv 2203.03466).
    """
    width = getattr(model.config.get_text_config(), "hidden_size", None)
    return rate * min(1.0, USUAL_WIDTH / width) if isinstance(width, int) else rate


def learning_rate(peak: float, share: float) -> float:
    """Return the learning rate at a share of the budget: a linear rise, then a cosine down to 0.

    >>> [round(learning_rate(1.0, share), 3) for share in (0.0, 0.025, 0.05, 0.525, 1.0)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if share < WARMUP:
        return peak * share / WARMUP
    return peak * 0.5 * (1 + math.cos(math.pi * (share - WARMUP) / (1 - WARMUP)))


def hold_out(calibration: Inputs, samples: int) -> tuple[Inputs, Inputs]:
    """Split a calibration set in two: the samples to train on, and so many others.

    These are spread evenly over token ids, which may come from several texts, and the last of other inputs.

    >>> hold_out(torch.arange(12).view(6, 2), 2)[1].tolist()
    [[4, 5], [10, 11]]
    """
    total = len(calibration)
    if not isinstance(calibration, torch.Tensor):
        return calibration[: total - samples], calibration[total - samples :]
    is_held_out = torch.zeros(total, dtype=torch.bool)
    is_held_out[[(i + 1) * total // samples - 1 for i in range(samples)]] = True
    return calibration[~is_held_out], calibration[is_held_out]


def endless_batches(inputs: Inputs, samples: int, seed: int) -> Iterator[Inputs]:
    """Yield batches of an endless row of epochs, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        if isinstance(inputs, torch.Tensor):
            yield from inputs[torch.randperm(len(inputs), generator=generator).to(inputs.device)].split(samples)
        else:
            batches = inputs.split(samples)
            yield from (batches[i] for i in torch.randperm(len(batches), generator=generator).tolist())


def tokens_in(inputs: Inputs) -> int:
    """Return the number of tokens of a batch, or an estimate for images and sounds."""
    return len(inputs) * tokens_per_sample(inputs)


@contextmanager
def in_float32(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Let parameters be trained in float32; afterwards each has its own dtype again, and no gradient.

    Small steps of the optimizer would be lost in 16 bits.
    """
    trained = [p for p in parameters if p.is_floating_point()]
    states = [(p.dtype, p.requires_grad) for p in trained]
    try:
        for parameter in trained:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        yield trained
    finally:
        for parameter, (dtype, requires_grad) in zip(trained, states, strict=True):
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(requires_grad)

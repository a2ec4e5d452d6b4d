"""Parts that the trainings of a refit share: batches, the schedule, float32 copies, narrow arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from ..models.inputs import Inputs, tokens_per_sample
from ..models.torch_internals import multiplies_bfloat16

BETAS = (0.9, 0.95)  # of Adam: the second moment forgets soon, since trainings have few steps
WARMUP = 0.05  # share of the budget in which the learning rate rises


def learning_rate(peak: float, share: float) -> float:
    """Return the learning rate at a share of the budget: a linear rise, then a cosine down to 0.

    >>> [round(learning_rate(1.0, share), 3) for share in (0.0, 0.025, 0.05, 0.525, 1.0)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if share < WARMUP:
        return peak * share / WARMUP
    return peak * 0.5 * (1 + math.cos(math.pi * (share - WARMUP) / (1 - WARMUP)))


def hold_out(calibration: Inputs, every: int) -> tuple[Inputs, Inputs]:
    """Split a calibration set in two: the samples to train on, and the last of every so many."""
    held_out = len(calibration) // every
    return calibration[: len(calibration) - held_out], calibration[len(calibration) - held_out :]


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


def narrow_arithmetic(device: torch.device) -> AbstractContextManager[None]:
    """Return a context that multiplies matrices in bfloat16 where the device is faster at that."""
    return torch.autocast(device.type, torch.bfloat16) if multiplies_bfloat16(device) else nullcontext()


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

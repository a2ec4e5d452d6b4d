"""Distillation without labels: train all weights of a pruned model to predict what the original predicts.

With p the original's and q the pruned model's probabilities of the next token, the loss of a token is KL(p || q)
(Hinton et al., arXiv 1503.02531, section 2, with the original's probabilities alone). Models that predict no tokens
learn their main output instead, by its squared error relative to the original's. The saved model is plain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import PrunerError
from ..models.blockwise import computing, native_compute
from ..models.dispatch import free_bytes
from ..models.inputs import Inputs
from ..models.running import equal_draws, evaluating, forward, main_output
from ..models.skeleton import parameter_count
from ..models.tasks import has_token_logits
from ..progress import Step
from .budget import Budget, Spending
from .tokens import KeptTokens
from .training import (
    BETAS,
    endless_batches,
    hold_out,
    in_float32,
    learning_rate,
    narrow_arithmetic,
    rate_for,
    tokens_in,
)

HELD_OUT = 16  # one sample of so many, and at most so many, measure the result
RATE = 2e-4  # up to 512 hidden channels
TOKENS_PER_STEP = 512
OTHERS_PER_STEP = 8  # samples of images or sounds
LARGEST_GRADIENT = 1.0
BYTES_PER_PARAMETER = 20  # float32: the weight, its gradient, two moments, and the value to go back to


@dataclass
class DistillReport:
    """Outcome of :func:`distill`.

    Attributes:
        tokens: tokens trained on.
        steps: steps of the optimizer.
        before: loss on held-out samples before the training.
        after: loss on held-out samples after the training.
    """

    tokens: int
    steps: int
    before: float
    after: float


def divergence(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Sum KL(p || q) over positions, from log-probabilities ``[..., tokens]``."""
    return (log_p.exp() * (log_p - log_q)).sum()


def relative_distance(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """Sum over positions the squared distance of two vectors ``[..., channels]``, relative to the first's length."""
    theirs, ours = theirs.float(), ours.float()
    return ((theirs - ours).square().sum(-1) / theirs.square().sum(-1).clamp_min(1e-12)).sum()


@dataclass(frozen=True)
class Distillation:
    """The loss of a pruned model against the original, batch by batch.

    Attributes:
        tokens: tokens that the pruned model kept; None if it has the original's vocabulary.
    """

    model: PreTrainedModel
    pruned: PreTrainedModel
    tokens: KeptTokens | None = None

    def loss(self, inputs: Inputs) -> torch.Tensor:
        """Return the mean loss over the positions of a batch."""
        with equal_draws():
            output = forward(self.pruned, inputs)
        with torch.no_grad(), equal_draws():
            theirs = main_output(forward(self.model, self.tokens.original_inputs(inputs) if self.tokens else inputs))
        ours, positions = main_output(output), theirs[..., 0].numel()
        if has_token_logits(self.pruned) and getattr(output, "logits", None) is not None:
            theirs = self.tokens.kept_logits(theirs) if self.tokens else theirs
            return divergence(ours.float().log_softmax(-1), theirs.float().log_softmax(-1)) / positions
        return relative_distance(theirs, ours) / positions

    @torch.no_grad()
    def mean_loss(self, inputs: Inputs, samples: int) -> float:
        """Return the mean loss of samples, run so many at a time."""
        return sum(self.loss(batch).item() * len(batch) for batch in inputs.split(samples)) / len(inputs)


def distill(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    calibration: Inputs,
    budget: Budget,
    *,
    tokens: KeptTokens | None = None,
    seed: int = 0,
) -> DistillReport:
    """Train all weights of ``pruned`` in place to predict what ``model`` predicts.

    Args:
        model: original model, which stays as it is.
        pruned: pruned model.
        calibration: LongTensor ``[samples, tokens]`` or other inputs of ``pruned``, a sixteenth of which is held out,
            at most 16; the others are repeated if the budget is larger.
        tokens: tokens that ``pruned`` kept; None if it has the vocabulary of ``model``.
        seed: of the order of the samples.

    Returns:
        Tokens, steps and held-out losses. Where the loss did not fall, the weights are as before.

    Raises:
        PrunerError: there are fewer than 16 samples, or the training does not fit in memory.
    """
    _check_memory(pruned)
    fitted, held_out = hold_out(calibration, min(len(calibration) // HELD_OUT, HELD_OUT))
    if not len(held_out):
        raise PrunerError(f"distillation needs at least {HELD_OUT} calibration samples, not {len(calibration)}")
    samples = OTHERS_PER_STEP
    if isinstance(calibration, torch.Tensor):
        samples = max(1, TOKENS_PER_STEP // calibration.shape[1])
    with (
        evaluating(model),
        evaluating(pruned),
        in_float32(pruned.parameters()) as trained,
        computing(model) as compute,
        narrow_arithmetic(compute.device),
    ):
        distillation = Distillation(model, pruned, tokens)
        held_out = held_out.to(compute.device)
        before = distillation.mean_loss(held_out, samples)
        start = [parameter.detach().clone() for parameter in trained]
        spending = Spending(budget)
        batches = endless_batches(fitted.to(compute.device), samples, seed)
        steps = _descend(distillation, trained, batches, spending)
        after = distillation.mean_loss(held_out, samples)
        if not after < before:
            for parameter, value in zip(trained, start, strict=True):
                parameter.data.copy_(value)
    return DistillReport(spending.tokens, steps, before, after)


def _check_memory(pruned: PreTrainedModel) -> None:
    """Refuse a training that would run out of memory, before it begins.

    Raises:
        PrunerError: as above.
    """
    device = native_compute(pruned).device
    held = sum(parameter.nbytes for parameter in pruned.parameters())
    needed, free = BYTES_PER_PARAMETER * parameter_count(pruned) - held, free_bytes(str(device))
    if needed > free:
        raise PrunerError(
            f"distillation needs {needed / 2**30:.1f} GiB more for float32 weights, gradients and moments, and "
            f"{free / 2**30:.1f} are free on {device}: use --refit blocks, which trains one block at a time, or ridge"
        )


def _descend(
    distillation: Distillation, trained: list[nn.Parameter], batches: Iterator[Inputs], spending: Spending
) -> int:
    """Train until the budget is spent, or the loss is not finite; return the steps of the optimizer."""
    peak = rate_for(distillation.pruned, RATE)
    optimizer = torch.optim.Adam(trained, lr=peak, betas=BETAS, fused=True)
    steps, parts = 0, 100
    with Step("distilling, percent of the budget", parts) as progress:
        while spending.share < 1:
            batch = next(batches)
            spending.tokens += tokens_in(batch)
            loss = distillation.loss(batch)
            if not loss.isfinite():
                break
            loss.backward()
            nn.utils.clip_grad_norm_(trained, LARGEST_GRADIENT)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(peak, spending.share)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            progress.done, progress.note = int(parts * spending.share), f"loss {loss.item():.3f}"
    return steps

"""Distillation without labels: train all weights of a pruned model to predict what the original predicts.

With p the original's and q the pruned model's probabilities of the next token, and h_p and h_q the hidden states behind
a layer of both, the loss of a token is

    KL(p || q)  +  b * mean over layers of |h_p - h_q|^2 / |h_p|^2

(Hinton et al., arXiv 1503.02531, section 2, with the original's probabilities alone; hidden states as in TinyBERT,
arXiv 1909.10351, equation 8, relative to the original's, so that b means the same for every model). Models that predict
no tokens learn their main output instead, by its relative squared error. The saved model is plain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import PrunerError
from ..models.blockwise import computing
from ..models.hooks import forward_hooks
from ..models.inputs import Inputs
from ..models.layers import hidden_out
from ..models.running import equal_draws, evaluating, forward, main_output
from ..models.tasks import has_token_logits
from ..progress import Step
from ..selection.plan import PruningPlan
from .budget import Budget, Spending
from .matching import matching_stacks
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
STREAM_WEIGHT = 1.0  # b
LARGEST_GRADIENT = 1.0


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


class Distillation:
    """The loss of a pruned model against the original, batch by batch.

    Args:
        plan: as for :func:`distill`.
        weight: b, the weight of the hidden states; 0 leaves them out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pruned: PreTrainedModel,
        plan: PruningPlan | None = None,
        weight: float = STREAM_WEIGHT,
    ):
        self.model, self.pruned, self.weight = model, pruned, weight
        self.stacks = matching_stacks(model, pruned, plan) if weight else []

    def loss(self, inputs: Inputs) -> torch.Tensor:
        """Return the mean loss over the positions of a batch."""
        with torch.no_grad():
            output, their_states = _run(self.model, inputs, [s.theirs[i] for s in self.stacks for i in s.last])
        theirs = main_output(output)
        output, our_states = _run(self.pruned, inputs, [layer for s in self.stacks for layer in s.ours])
        ours = main_output(output)
        if has_token_logits(self.pruned) and getattr(output, "logits", None) is not None:
            total = divergence(ours.float().log_softmax(-1), theirs.float().log_softmax(-1)) / theirs[..., 0].numel()
        else:
            total = _mean_distance(theirs, ours)
        stacks = [stack for stack in self.stacks for _ in stack.ours]
        if not len(stacks) == len(their_states) == len(our_states):  # layers that run several times, as ALBERT's do
            stacks, their_states, our_states = [], [], []
        for stack, h_p, h_q in zip(stacks, their_states, our_states, strict=True):
            if (target := stack.comparable(h_p, h_q)) is not None:
                total = total + self.weight / len(stacks) * _mean_distance(target, h_q)
        return total

    @torch.no_grad()
    def mean_loss(self, inputs: Inputs, samples: int) -> float:
        """Return the mean loss of samples, run so many at a time."""
        return sum(self.loss(batch).item() * len(batch) for batch in inputs.split(samples)) / len(inputs)


def _mean_distance(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    return relative_distance(theirs, ours) / theirs[..., 0].numel()


def _run(model: PreTrainedModel, inputs: Inputs, layers: list[nn.Module]) -> tuple[Any, list[torch.Tensor]]:
    """Return a model's output and the hidden states behind some layers."""
    states: list[torch.Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        states.append(hidden_out(output))

    with forward_hooks([(layer, keep) for layer in layers]), equal_draws():
        return forward(model, inputs), states


def distill(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    calibration: Inputs,
    budget: Budget,
    *,
    plan: PruningPlan | None = None,
    seed: int = 0,
) -> DistillReport:
    """Train all weights of ``pruned`` in place to predict what ``model`` predicts.

    Args:
        model: original model, which stays as it is.
        pruned: pruned model, of the same vocabulary.
        calibration: LongTensor ``[samples, tokens]`` or other inputs, a sixteenth of which is held out, at most 16;
            the others are repeated if the budget is larger.
        plan: plan of the pruned model; needed if it lost layers.
        seed: of the order of the samples.

    Returns:
        Tokens, steps and held-out losses. Where the loss did not fall, the weights are as before.

    Raises:
        PrunerError: there are fewer than 16 samples.
    """
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
        distillation = Distillation(model, pruned, plan)
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

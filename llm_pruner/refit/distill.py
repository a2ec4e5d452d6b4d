"""Distillation without labels: train all weights of a pruned model to predict what the original predicts.

With p the original's and q the pruned model's probabilities of the next token, the loss of a token is KL(p || q)
(Hinton et al., arXiv 1503.02531, section 2, with the original's probabilities alone). Models that predict no tokens
learn their main output instead, by its squared error relative to the original's. The saved model is plain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..models.arithmetic import narrow_arithmetic
from ..models.blockwise import computing
from ..models.inputs import Inputs
from ..models.running import equal_draws, evaluating, forward, main_output
from ..models.skeleton import parameter_count
from ..models.tasks import has_token_logits
from ..unfinished import NOTHING_KEPT, Unfinished
from .budget import Budget
from .tokens import KeptTokens
from .training import TrainingReport, check_memory, in_float32, train_together

RATE = 2e-4  # up to 512 hidden channels


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


def distill(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    calibration: Inputs,
    budget: Budget,
    *,
    tokens: KeptTokens | None = None,
    seed: int = 0,
    unfinished: Unfinished = NOTHING_KEPT,
) -> TrainingReport:
    """Train all weights of ``pruned`` in place to predict what ``model`` predicts.

    Args:
        model: original model, which stays as it is.
        pruned: pruned model.
        calibration: LongTensor ``[samples, tokens]`` or other inputs of ``pruned``, a sixteenth of which is held out,
            at most 16; the others are repeated if the budget is larger.
        tokens: tokens that ``pruned`` kept; None if it has the vocabulary of ``model``.
        seed: of the order of the samples.
        unfinished: keeps what is done, and has what a run that was stopped had done.

    Returns:
        Tokens, steps and held-out losses. Where the loss did not fall, the weights are as before.

    Raises:
        PrunerError: there are fewer than 16 samples, or the training does not fit in memory.
    """
    parameters = parameter_count(pruned)
    check_memory(pruned, parameters, 4 * parameters - sum(parameter.nbytes for parameter in pruned.parameters()))
    with (
        evaluating(model),
        evaluating(pruned),
        in_float32(pruned.parameters()) as trained,
        computing(model) as compute,
        narrow_arithmetic(compute.device),
    ):
        loss = Distillation(model, pruned, tokens).loss
        options: Any = {"budget": budget, "seed": seed, "unfinished": unfinished}
        return train_together(pruned, trained, loss, calibration, rate=RATE, **options)

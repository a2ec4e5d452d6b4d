"""The loss of the next token, in the memory of the logits."""

from __future__ import annotations

from typing import Any

import torch


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
            total -= log_probabilities.gather(-1, target[:, None]).sum().cpu().double()
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

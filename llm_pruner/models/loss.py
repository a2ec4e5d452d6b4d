"""The loss of a language model, token by token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ..errors import PrunerError
from .inputs import reads_text_only
from .running import model_inputs, target_ids
from .tasks import predicts_tokens

IGNORED = -100  # target of tokens that are not learnt; the losses of torch and transformers skip it


def has_loss(model: nn.Module) -> bool:
    """Return True for a model that predicts the next token of a text."""
    return predicts_tokens(model) and reads_text_only(model)


@torch.no_grad()
def total_loss(model: nn.Module, batches: Iterable[Any], fresh: int | None = None) -> tuple[float, int]:
    """Return the summed cross entropy of all predicted tokens in nats, and their number.

    Args:
        batches: LongTensors ``[samples, tokens]``. An encoder-decoder reads the first half of each sample and predicts
            the second.
        fresh: count only this many tokens at the end of each sample; the others are context (default: all).

    Raises:
        PrunerError: the model is no language model.
    """
    if not has_loss(model):
        raise PrunerError(f"{type(model).__name__} does not predict the next token: it has no loss on a text")
    total, tokens = 0.0, 0
    for ids in batches:
        inputs = model_inputs(model, ids)
        targets = target_ids(inputs)[:, 1:]
        context = 0 if fresh is None else max(targets.shape[1] - fresh, 0)
        logits = model(**inputs, use_cache=False).logits[:, context:-1]
        targets = targets[:, context:]
        tokens += targets.numel()
        for row, target in zip(logits, targets, strict=True):  # one sample in fp32 at a time
            total += cross_entropy(row.float(), target, reduction="sum").item()
    return total, tokens

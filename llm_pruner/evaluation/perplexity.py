"""Perplexity by LLM-Pruner's protocol: windows of ``seq_len`` tokens side by side, mean over all tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import PrunerError
from ..graph import Compute, computing, context_length, evaluating, model_inputs, predicted


@dataclass
class Perplexity:
    """``perplexity`` is ``exp(loss)``, ``loss`` the mean over ``tokens`` predicted tokens, in nats."""

    perplexity: float
    loss: float
    tokens: int
    windows: int
    seq_len: int


def windows(
    tokenizer: PreTrainedTokenizerBase, text: str, seq_len: int, max_windows: int | None = None
) -> torch.Tensor:
    """A text as LongTensor ``[windows, seq_len]``; the rest that fills no window is left out.

    Raises:
        PrunerError: the text is shorter than one window.
    """
    if seq_len < 2:
        raise PrunerError(f"seq_len {seq_len} is out of range: a window needs at least 2 tokens")
    ids = torch.tensor(tokenizer(text, truncation=False, verbose=False)["input_ids"], dtype=torch.long)
    count = len(ids) // seq_len
    if count == 0:
        raise PrunerError(f"the text has {len(ids)} tokens, less than one window of {seq_len}: lower --seq_len")
    return ids[: count * seq_len].view(count, seq_len)[:max_windows]


def check_length(model: PreTrainedModel, tokens: int) -> None:
    """Refuse windows that the model cannot read.

    Raises:
        PrunerError: the model reads fewer tokens at once.
    """
    longest = context_length(model)
    if longest is not None and tokens > longest:
        raise PrunerError(
            f"windows of {tokens} tokens are too long: the model reads at most {longest}; give shorter ones"
        )


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, ids: torch.Tensor, batch_size: int = 4, compute: Compute | None = None
) -> Perplexity:
    """Perplexity of a model on windows ``[windows, seq_len]``.

    Each window predicts its tokens 1 .. seq_len - 1 from those before them in the same window. An encoder-decoder is
    given the first half of each window and predicts the second.

    Args:
        compute: where and how to compute, if not as the model is: weights are then converted block by block.

    Raises:
        PrunerError: the windows are longer than the model reads.
    """
    check_length(model, ids.shape[1])
    total, tokens = 0.0, 0
    with evaluating(model), computing(model, compute) as used:
        for batch in ids.to(used.device).split(batch_size):
            inputs = model_inputs(model, batch)
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            targets = predicted(inputs)[:, 1:]
            tokens += targets.numel()
            for row, target in zip(logits, targets, strict=True):  # one window in fp32 at a time
                total += cross_entropy(row.float(), target, reduction="sum").item()
    loss = total / tokens
    return Perplexity(math.exp(loss) if loss < 700 else math.inf, loss, tokens, ids.shape[0], ids.shape[1])


def parameter_count(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())

"""Perplexity: by LLM-Pruner's protocol, windows of ``seq_len`` tokens side by side, or by windows that overlap."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from accelerate.utils import find_executable_batch_size
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import PrunerError
from ..models.blockwise import Compute, computing
from ..models.loss import total_loss
from ..models.running import context_length, evaluating

FITTING = 32  # windows to try first; fewer as long as memory runs out


@dataclass
class Perplexity:
    """``perplexity`` is ``exp(loss)``, ``loss`` the mean over ``tokens`` predicted tokens, in nats.

    ``tokens_per_byte`` is that of the text in UTF-8, where it is known.
    """

    perplexity: float
    loss: float
    tokens: int
    windows: int
    seq_len: int
    stride: int
    tokens_per_byte: float | None = None

    @property
    def per_byte(self) -> float | None:
        """The perplexity of a byte, which compares between tokenizers."""
        return None if self.tokens_per_byte is None else math.exp(self.loss * self.tokens_per_byte)


def tokens_per_byte(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, stride: int | None = None) -> float:
    """Tokens for each byte of the text that windows (of ``stride``) were cut from."""
    text = ids.flatten() if not stride else torch.cat([ids[:, :stride].flatten(), ids[-1, stride:]])
    return len(text) / max(1, len(str(tokenizer.decode(text.tolist())).encode()))


def windows(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    seq_len: int,
    max_windows: int | None = None,
    stride: int | None = None,
) -> torch.Tensor:
    """A text as LongTensor ``[windows, seq_len]``; the rest that fills no window is left out.

    Args:
        stride: tokens from the beginning of a window to that of the next; by default ``seq_len``: side by side.

    Raises:
        PrunerError: the text is shorter than one window, or ``stride`` out of range.
    """
    stride = seq_len if stride is None else stride
    if not 1 <= stride <= seq_len:
        raise PrunerError(f"stride {stride} is out of range: give 1 to seq_len, {seq_len}")
    if seq_len < 2:
        raise PrunerError(f"seq_len {seq_len} is out of range: a window needs at least 2 tokens")
    ids = torch.tensor(tokenizer(text, truncation=False, verbose=False)["input_ids"], dtype=torch.long)
    count = len(ids) // seq_len
    if count == 0:
        raise PrunerError(f"the text has {len(ids)} tokens, less than one window of {seq_len}: lower --seq_len")
    return ids.unfold(0, seq_len, stride)[:max_windows]


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
    model: PreTrainedModel,
    ids: torch.Tensor,
    batch_size: int | None = 4,
    compute: Compute | None = None,
    stride: int | None = None,
) -> Perplexity:
    """Perplexity of a model on windows ``[windows, seq_len]``.

    Each window predicts its tokens 1 .. seq_len - 1 from those before them in the same window. An encoder-decoder is
    given the first half of each window and predicts the second.

    Args:
        batch_size: windows in a forward pass; None finds out how many fit.
        compute: where and how to compute, if not as the model is: weights are then converted block by block.
        stride: that the windows were cut with, if they overlap: of all but the first only the last ``stride`` tokens
            count, the others are there to be read.

    Raises:
        PrunerError: the windows are longer than the model reads.
    """
    check_length(model, ids.shape[1])
    stride = ids.shape[1] if stride is None else stride

    def measured(batch_size: int) -> tuple[float, int]:
        with evaluating(model), computing(model, compute) as used:
            there = ids.to(used.device)
            if stride == ids.shape[1]:
                return total_loss(model, there.split(batch_size))
            first, tokens = total_loss(model, [there[:1]])
            others, more = total_loss(model, there[1:].split(batch_size), stride)
            return first + others, tokens + more

    if batch_size is None:
        try:
            total, tokens = find_executable_batch_size(measured, starting_batch_size=FITTING)()
        except RuntimeError as error:
            if "reached zero" in str(error):  # accelerate's word for it
                raise MemoryError("out of memory with one window at a time") from error
            raise
    else:
        total, tokens = measured(batch_size)
    loss = total / tokens
    value = math.exp(loss) if loss < 700 else math.inf
    return Perplexity(value, loss, tokens, ids.shape[0], ids.shape[1], stride)

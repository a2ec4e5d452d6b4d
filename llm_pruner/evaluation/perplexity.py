"""Perplexity over windows of ``seq_len`` tokens, side by side or overlapping."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
from accelerate.utils import find_executable_batch_size
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import PrunerError
from ..models.blockwise import Compute, computing
from ..models.generate import leading_tokens
from ..models.loss import total_loss
from ..models.running import context_length, evaluating
from ..progress import track

WINDOWS_PER_PASS = 32  # to try first where no batch size is given; halved as long as memory runs out
LARGEST_LOSS = 700.0  # nats per token; exp overflows soon after


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a model on a text.

    Attributes:
        perplexity: perplexity per token, ``exp(loss)``.
        loss: mean loss over the predicted tokens, in nats.
        tokens: number of predicted tokens.
        windows, seq_len, stride: number, length and stride of the windows that the text was cut into, in tokens.
        byte_perplexity: perplexity per byte, which compares across tokenizers: exp of the total loss divided by the
            number of UTF-8 bytes of the predicted tokens. None without a tokenizer.
        seconds: time of the pass over all windows; it does not count when results are compared.
    """

    perplexity: float
    loss: float
    tokens: int
    windows: int
    seq_len: int
    stride: int
    byte_perplexity: float | None = None
    seconds: float | None = field(default=None, compare=False)


def windows(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    seq_len: int,
    max_windows: int | None = None,
    *,
    stride: int | None = None,
    bos: bool = True,
) -> torch.Tensor:
    """Cut a text into windows: LongTensor ``[windows, seq_len]``; a rest shorter than a window is left out.

    Args:
        stride: tokens from the start of a window to the start of the next; None: side by side.
        bos: begin every window with the tokens that the tokenizer puts before a text, which count towards ``seq_len``;
            False cuts windows from running text, as LLM-Pruner does.

    Raises:
        PrunerError: the text is shorter than one window, or ``stride`` is out of range.
    """
    stride = seq_len if stride is None else stride
    if not 1 <= stride <= seq_len:
        raise PrunerError(f"stride {stride} is out of range: give 1 to seq_len, {seq_len}")
    if seq_len < 2:
        raise PrunerError(f"seq_len {seq_len} is out of range: a window needs at least 2 tokens")
    ids = torch.tensor(tokenizer(text, truncation=False, verbose=False)["input_ids"], dtype=torch.long)
    if len(ids) < seq_len:
        raise PrunerError(f"the text has {len(ids)} tokens, less than one window of {seq_len}: lower --seq_len")
    start = leading_tokens(tokenizer) if bos else []
    length = seq_len - len(start)
    if length < 1:
        raise PrunerError(f"seq_len {seq_len} is out of range: the tokenizer puts {len(start)} tokens before a text")
    rows = ids[len(start) :].unfold(0, length, min(stride, length))[:max_windows]
    return torch.cat([torch.tensor(start, dtype=torch.long).expand(len(rows), -1), rows], dim=1)


def title_of_text(name: str, tokenizer: PreTrainedTokenizerBase, bos: bool) -> str:
    """Return the name of a text for tables, where it says if windows lack tokens that the tokenizer would begin with.

    Perplexities with and without them do not compare.
    """
    return f"{name} without BOS" if not bos and leading_tokens(tokenizer) else name


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
    *,
    compute: Compute | None = None,
    stride: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model_name: str | None = None,
    text_name: str = "the text",
) -> Perplexity:
    """Measure the perplexity of a model on windows ``[windows, seq_len]``.

    Each window predicts its tokens 1 .. seq_len - 1 from the tokens before them in the same window. An encoder-decoder
    reads the first half of each window and predicts the second.

    Args:
        batch_size: windows per forward pass; None tries 32 and halves that as long as memory runs out.
        compute: device and dtype to compute with, weights converted block by block; None: the model's own.
        stride: stride that the windows were cut with, if they overlap. All windows but the first then predict only
            their last ``stride`` tokens; the tokens before are context.
        tokenizer: measures the byte perplexity as well.
        model_name, text_name: for the error; the model is called by its checkpoint or class where no name is given.

    Raises:
        PrunerError: the windows are longer than the model reads, or the loss is not finite.
    """
    check_length(model, ids.shape[1])
    if model.config.is_encoder_decoder and ids.shape[1] < 3:
        raise PrunerError("an encoder-decoder predicts one half of a window from the other: give --seq_len 3 or more")
    stride = ids.shape[1] if stride is None else stride
    step = f"perplexity on {text_name}"

    def measure_loss(batch_size: int) -> tuple[float, int]:
        with evaluating(model), computing(model, compute) as used:
            rows = ids.to(used.device)
            if stride == ids.shape[1]:
                return total_loss(model, track(rows.split(batch_size), step))
            first, tokens = total_loss(model, [rows[:1]])
            if len(rows) == 1:
                return first, tokens
            others, more = total_loss(model, track(rows[1:].split(batch_size), step), stride)
            return first + others, tokens + more

    start = time.perf_counter()
    if batch_size is None:
        total, tokens = _with_fitting_batch_size(measure_loss)
    else:
        total, tokens = measure_loss(batch_size)
    seconds = time.perf_counter() - start
    loss = total / tokens
    if not loss < LARGEST_LOSS:
        name = model_name or model.name_or_path or type(model).__name__
        raise PrunerError(f"the loss of {name} on {text_name} is {_explain_loss(model, loss)}")
    per_byte = None
    if tokenizer is not None:
        predicted = predicted_tokens(ids, stride, encoder_decoder=model.config.is_encoder_decoder)
        per_byte = math.exp(total / max(1, len(str(tokenizer.decode(predicted.tolist())).encode())))
    return Perplexity(math.exp(loss), loss, tokens, ids.shape[0], ids.shape[1], stride, per_byte, seconds)


def predicted_tokens(ids: torch.Tensor, stride: int, *, encoder_decoder: bool = False) -> torch.Tensor:
    """Return the tokens of windows ``[windows, seq_len]`` that :func:`perplexity` counts: LongTensor ``[tokens]``.

    >>> predicted_tokens(torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5]]), stride=2).tolist()
    [1, 2, 3, 4, 5]
    """
    targets = ids[:, (ids.shape[1] // 2 if encoder_decoder else 0) + 1 :]
    if stride == ids.shape[1]:
        return targets.flatten()
    return torch.cat([targets[0], targets[1:, -stride:].flatten()])


def byte_perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, seq_len: int = 128) -> float:
    """Measure the perplexity per byte of a text, every token predicted once except the first.

    Windows overlap by one token, so that models of different tokenizers are measured on all of the text; those of an
    encoder-decoder lie side by side. See :attr:`Perplexity.byte_perplexity` for the definition.

    Raises:
        PrunerError: the text is shorter than one window, or the loss is not finite.
    """
    stride = seq_len if model.config.is_encoder_decoder else seq_len - 1
    ids = windows(tokenizer, text, seq_len, stride=stride)
    return cast(float, perplexity(model, ids, 8, stride=stride, tokenizer=tokenizer).byte_perplexity)


def _with_fitting_batch_size(measure: Callable[[int], tuple[float, int]]) -> tuple[float, int]:
    """Call ``measure`` with the largest batch size that memory allows."""
    try:
        return cast(tuple[float, int], find_executable_batch_size(measure, starting_batch_size=WINDOWS_PER_PASS)())
    except RuntimeError as error:
        if "reached zero" in str(error):  # accelerate's word for it
            raise MemoryError("out of memory with one window at a time") from error
        raise


def _explain_loss(model: PreTrainedModel, loss: float) -> str:
    """Say why a loss gives no perplexity."""
    broken = [n for n, p in model.named_parameters() if p.device.type != "meta" and not bool(p.isfinite().all())]
    if broken:
        return f"not finite: its weights hold NaN or infinity, first in {broken[0]} ({len(broken)} tensors in all)"
    if math.isfinite(loss):
        return f"{loss:.0f} nats per token, too large for a perplexity: the model is broken"
    return f"not finite, although its weights are: {model.dtype} may overflow, load it with --dtype float32"

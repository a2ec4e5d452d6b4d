"""Measure how fast a model reads and generates, and the memory that it takes."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..errors import PrunerError
from ..models.generate import TokenClock, generate
from ..models.inputs import example_inputs
from ..models.running import context_length
from ..peak_memory import PeakMemory
from .latency import latency

REPEATS = 3  # generations, of which the median counts
PROMPT_TOKENS = 16
LEAST_PEAK = 2**20  # bytes; memory that was free in the heap before does not show in a process's account


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Speed of a model on ``batch`` sequences at once.

    Attributes:
        tokens: per sequence read by a forward pass.
        new_tokens: per sequence generated with a cache.
        prefill: tokens read per second.
        decode: tokens generated per second, reading the prompt excluded; None for a model that cannot generate, such as
            one whose context is full after the prompt.
        peak_bytes: most memory beyond that of before; on CUDA the most that the allocator held, weights included. None
            on a CPU where the process took less than 1 MiB from the system.
    """

    tokens: int
    batch: int
    new_tokens: int
    prefill: float
    decode: float | None
    peak_bytes: int | None


def speed(model: PreTrainedModel, tokens: int = 128, batch: int = 1, *, new_tokens: int = 32) -> Speed:
    """Measure a model on the device that it is on.

    On CUDA this resets the allocator's peak, which ``torch.cuda.max_memory_allocated`` reports.
    """
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    with PeakMemory() as memory:
        prefill = batch * tokens / (latency(model, tokens, batch) / 1e6)
        decode = _decode_speed(model, min(tokens, PROMPT_TOKENS), batch, new_tokens)
    peak = torch.cuda.max_memory_allocated(model.device) if cuda else memory.peak - memory.before
    return Speed(
        tokens=tokens,
        batch=batch,
        new_tokens=new_tokens,
        prefill=prefill,
        decode=decode,
        peak_bytes=peak if cuda or peak > LEAST_PEAK else None,
    )


def _decode_speed(model: PreTrainedModel, prompt_tokens: int, batch: int, new_tokens: int) -> float | None:
    """Return the tokens per second of the decoding steps alone: the clock starts when the prompt has been read."""
    room = (context_length(model) or 2**31) - prompt_tokens
    if not model.can_generate() or model.config.is_encoder_decoder or room < 2:
        return None
    ids = example_inputs(model, batch, prompt_tokens)
    if not isinstance(ids, torch.Tensor):
        return None
    speeds = []
    for _ in range(REPEATS):
        clock = TokenClock()
        try:
            generate(model, ids, new_tokens=min(1 + new_tokens, room), exact=True, clock=clock)
        except PrunerError:
            return None
        speeds.append(batch * (clock.tokens - 1) / clock.seconds)
    return statistics.median(speeds)

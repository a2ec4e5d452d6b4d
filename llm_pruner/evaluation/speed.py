"""Measure how fast models read and generate, and the memory that they take."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..errors import PrunerError
from ..models.generate import TokenClock, generate
from ..models.inputs import example_inputs, reads_text_only
from ..models.running import context_length
from ..peak_memory import PeakMemory
from ..turns import ROUNDS, Ratio, in_turns, paired_ratio, relative_spread
from .latency import pass_clock

PROMPT_TOKENS = 16
LEAST_PEAK = 2**20  # bytes; memory that was free in the heap before does not show in a process's account
Clock = Callable[[], float | None]  # measures one repetition, in tokens per second


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Speed of a model on ``batch`` sequences at once.

    Attributes:
        tokens: per sequence read by a forward pass.
        new_tokens: per sequence generated with a cache.
        prefill: tokens read per second, the median of all rounds.
        decode: tokens generated per second, reading the prompt excluded, the median of all rounds; None for a model
            that cannot generate, such as one whose context is full after the prompt.
        peak_bytes: peak memory during the warm-up, beyond the memory in use before it; on CUDA the model's weights and
            the allocator's peak beyond the memory in use before. None on a CPU if the process took less than 1 MiB from
            the system.
        rounds: repetitions of each measurement, after a warm-up.
        prefill_spread, decode_spread: interquartile range of the rounds over their median.
        prefill_ratio, decode_ratio: to the first model that took turns with this one; None for the first model itself,
            for a model that took no turns, and where there is no speed.
    """

    tokens: int
    batch: int
    new_tokens: int
    prefill: float
    decode: float | None
    peak_bytes: int | None
    rounds: int = 1
    prefill_spread: float | None = None
    decode_spread: float | None = None
    prefill_ratio: Ratio | None = None
    decode_ratio: Ratio | None = None


def speed(model: PreTrainedModel, tokens: int = 128, batch: int = 1, *, new_tokens: int = 32) -> Speed:
    """Measure one model on the device that it is on; see :func:`speeds`."""
    return speeds([model], tokens, batch, new_tokens=new_tokens)[0]


def speeds(
    models: Sequence[PreTrainedModel], tokens: int = 128, batch: int = 1, *, new_tokens: int = 32
) -> list[Speed]:
    """Measure models in turns, each on the device that it is on: a warm-up of each, then 7 rounds of all.

    A model whose context is shorter reads fewer tokens. On CUDA this resets the allocator's peak, which
    ``torch.cuda.max_memory_allocated`` reports.
    """
    sizes = [tokens_read(model, tokens) for model in models]
    readers = [_prefill_clock(model, size, batch) for model, size in zip(models, sizes, strict=True)]
    writers = [
        _decode_clock(model, min(size, PROMPT_TOKENS), batch, new_tokens)
        for model, size in zip(models, sizes, strict=True)
    ]
    peaks = [_warm_up(*one) for one in zip(models, readers, writers, strict=True)]
    reading, writing = in_turns(readers), in_turns(writers)
    results = []
    for i, (size, peak) in enumerate(zip(sizes, peaks, strict=True)):
        prefill, prefill_spread, prefill_ratio = _summarize(reading[i], reading[0] if i else None)
        decode, decode_spread, decode_ratio = _summarize(writing[i], writing[0] if i else None)
        assert prefill is not None  # every model reads
        results.append(
            Speed(
                tokens=size,
                batch=batch,
                new_tokens=new_tokens,
                prefill=prefill,
                decode=decode,
                peak_bytes=peak,
                rounds=ROUNDS,
                prefill_spread=prefill_spread,
                decode_spread=decode_spread,
                prefill_ratio=prefill_ratio,
                decode_ratio=decode_ratio,
            )
        )
    return results


def tokens_read(model: PreTrainedModel, tokens: int) -> int:
    """Return how many of ``tokens`` a forward pass reads: as many as the context holds; 1 for images or sounds."""
    return min(tokens, context_length(model) or 2**31) if reads_text_only(model) else 1


def warnings_of(names: Sequence[str], measured: Sequence[Speed | None]) -> list[str]:
    """Return a sentence for every ratio of speeds that is noise, since its rounds vary too much."""
    ratios = [
        (f"{name}, {what}", ratio)
        for name, one in zip(names, measured, strict=True)
        if one is not None
        for what, ratio in (("read tok/s", one.prefill_ratio), ("write tok/s", one.decode_ratio))
    ]
    return [f"{name}: {ratio.warning}" for name, ratio in ratios if ratio is not None and ratio.warning]


def _summarize(
    values: Sequence[float | None], first: Sequence[float | None] | None
) -> tuple[float | None, float | None, Ratio | None]:
    """Return median, spread and ratio to the first model's; None if a model has no speed."""
    speeds_of_rounds, others = ([v for v in row if v is not None] for row in (values, first or ()))
    if len(speeds_of_rounds) < len(values):
        return None, None, None
    ratio = paired_ratio(speeds_of_rounds, others) if len(others) == len(values) else None
    return statistics.median(speeds_of_rounds), relative_spread(speeds_of_rounds), ratio


def _warm_up(model: PreTrainedModel, read: Clock, write: Clock) -> int | None:
    """Measure once without keeping the speeds; return the peak memory."""
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
    with PeakMemory() as memory:
        read()
        write()
    if cuda:
        weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if t.device == model.device)
        return weights + torch.cuda.max_memory_allocated(model.device) - before
    peak = memory.peak - memory.before
    return peak if peak > LEAST_PEAK else None


def _prefill_clock(model: PreTrainedModel, tokens: int, batch: int) -> Clock:
    measure = pass_clock(model, tokens, batch)
    return lambda: batch * tokens / (measure() / 1e6)


def _decode_clock(model: PreTrainedModel, prompt_tokens: int, batch: int, new_tokens: int) -> Clock:
    """Return the clock of the decoding steps alone: it starts when the prompt has been read."""
    room = (context_length(model) or 2**31) - prompt_tokens
    ids = None
    if model.can_generate() and not model.config.is_encoder_decoder and room >= 2:
        ids = example_inputs(model, batch, prompt_tokens)
    if not isinstance(ids, torch.Tensor):
        return lambda: None

    def measure() -> float | None:
        clock = TokenClock()
        try:
            generate(model, ids, new_tokens=min(1 + new_tokens, room), exact=True, clock=clock)
        except PrunerError:
            return None
        return batch * (clock.tokens - 1) / clock.seconds

    return measure

"""How fast a model reads and writes here, and what memory that takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..models.running import evaluating, random_tokens
from .latency import latency

REPEATS = 3
LEAST = 2**20  # bytes: a pass takes more, so that less than that was not seen


@dataclass
class Speed:
    """Of ``batch`` sequences at once: ``tokens`` each are read, ``new_tokens`` each written with a cache.

    Attributes:
        prefill: tokens read in a second.
        decode: tokens written in a second; None for what does not go on with a text.
        peak_bytes: memory beside what was there before, at most, while both were done; on CUDA what the allocator
            held in all, weights included. None where the system does not tell, or memory that was free already did.
    """

    tokens: int
    batch: int
    new_tokens: int
    prefill: float
    decode: float | None
    peak_bytes: int | None


@torch.no_grad()
def speed(model: PreTrainedModel, tokens: int = 128, batch: int = 1, new_tokens: int = 32) -> Speed:
    """Time a model where it lies: the median of a few passes, after one to warm up."""
    peak = _peak_since(model)
    prefill = batch * tokens / (latency(model, tokens, batch) / 1e6)
    decode = None
    if model.can_generate() and not model.config.is_encoder_decoder:
        ids = random_tokens(model, batch, min(tokens, 16))
        both = [_seconds(lambda count=count: _generate(model, ids, count), model) for count in (1, 1 + new_tokens)]  # type: ignore[misc]
        decode = batch * new_tokens / (both[1] - both[0])  # without reading the prompt
    return Speed(tokens, batch, new_tokens, prefill, decode, peak())


def _generate(model: PreTrainedModel, ids: torch.Tensor, count: int) -> None:
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=count, min_new_tokens=count, pad_token_id=0, eos_token_id=None
    )
    with evaluating(model):
        cast(Any, model).generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)


def _seconds(action: Callable[[], None], model: PreTrainedModel) -> float:
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        action()
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _peak_since(model: PreTrainedModel) -> Callable[[], int | None]:
    """Start to watch memory; the function returned tells the peak."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        return lambda: torch.cuda.max_memory_allocated(model.device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's way to start its peak anew
        before = _status("VmRSS")
    except (OSError, StopIteration):
        return lambda: None

    def peak() -> int | None:
        taken = _status("VmHWM") - before
        return taken if taken > LEAST else None  # what was free in the heap from before does not show

    return peak


def _status(name: str) -> int:
    """A number of bytes from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024

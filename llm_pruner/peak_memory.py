"""Memory of this process: its resident peak in a block of code, what it can give back, and its peak on GPUs."""

from __future__ import annotations

import ctypes
import sys
import threading
from typing import Any

import psutil
import torch

INTERVAL = 0.01  # seconds between samples


def give_back_memory() -> None:
    """Give the system the memory of freed tensors, which glibc otherwise keeps for this process."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def reset_gpu_peaks() -> None:
    """Let :func:`gpu_peak` tell of what comes after this call."""
    for device in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        torch.cuda.reset_peak_memory_stats(device)


def gpu_peak() -> int | None:
    """Return the most bytes of tensors on each GPU, summed over all GPUs; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))


class PeakMemory:
    """Context manager that samples the resident memory of this process while its block runs.

    Nothing of the process is reset, so blocks may nest. Peaks shorter than the interval of 10 ms can be missed.

    Attributes:
        before: bytes resident when the block began.
        peak: most bytes resident at any sample of the block.

    >>> with PeakMemory() as memory:
    ...     data = bytearray(2**20)
    >>> memory.peak >= memory.before
    True
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._stop = threading.Event()
        self.before = self.peak = 0

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = self._resident()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        self._sampler.join()
        self.peak = max(self.peak, self._resident())

    def _resident(self) -> int:
        return int(self._process.memory_info().rss)

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.peak = max(self.peak, self._resident())

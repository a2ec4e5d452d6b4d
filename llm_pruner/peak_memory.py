"""Resident memory of this process: its peak in a block of code, and what it can give back."""

from __future__ import annotations

import ctypes
import sys
import threading
from typing import Any

import psutil

INTERVAL = 0.01  # seconds between samples


def give_back_memory() -> None:
    """Give the system the memory of freed tensors, which glibc otherwise keeps for this process."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


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

"""Presets: named defaults of a method. docs/explanation/choosing.md has the measurements behind them."""

from __future__ import annotations

from typing import Any

from ..choices import SELF

# LLM-Pruner to the letter: its documented command without the flags that choose a method.
PAPER: dict[str, Any] = {
    "pruner_type": "taylor",
    "taylor": "param_first",
    "grouping_strategy": "sum",
    "calib_dataset": "bookcorpus",
    "num_examples": 10,
    "calib_seq_len": 64,
    "bos": False,
    "compensate": "none",
    "self_examples": 0,
    "hardware_align": False,
}
# Best measured: neurons only, in the middle layers, by second-order scores of text that the model writes itself,
# refitted afterwards on twice as much of such text.
BEST: dict[str, Any] = PAPER | {
    "taylor": "param_second",
    "calib_dataset": SELF,
    "num_examples": 128,
    "calib_seq_len": 128,
    "bos": True,
    "compensate": "least_squares",
    "self_examples": 128,
    "hardware_align": True,
}
PRESETS = {"best": BEST, "paper": PAPER}


def default_layers(preset: str, count: int) -> range:
    """Return the layers whose heads and neurons a preset prunes, of ``count``.

    ``paper`` spares the first three and the last; ``best`` the first eighth and the last fifteenth, at least one on
    either side.

    >>> default_layers("paper", 32), default_layers("best", 30)
    (range(3, 31), range(4, 28))
    """
    if preset == "paper":
        return range(min(3, count - 1), count - 1)
    start, end = max(1, round(count / 8)), count - max(1, round(count / 15))
    return range(start, end) if start < end else range(count)

"""Named choices of method. docs/choosing.md has the measurements behind them."""

from __future__ import annotations

from typing import Any

# LLM-Pruner to the letter: its documented command without the flags that choose a method.
PAPER: dict[str, Any] = {
    "pruner_type": "taylor",
    "taylor": "param_first",
    "grouping_strategy": "sum",
    "num_examples": 10,
    "calib_seq_len": 64,
    "compensate": "none",
    "self_examples": 0,
    "hardware_align": False,
}
# What measured best: neurons only, in the middle layers, by second-order scores of more text, and refitted afterwards
# on that text and as much again that the model writes itself.
BEST: dict[str, Any] = PAPER | {
    "taylor": "param_second",
    "num_examples": 128,
    "calib_seq_len": 128,
    "compensate": "least_squares",
    "self_examples": 128,
    "hardware_align": True,
}
PRESETS = {"best": BEST, "paper": PAPER}


def middle(count: int) -> range:
    """The layers that ``best`` prunes: all but the first eighth and the last fifteenth, at least one on either side."""
    start, end = max(1, round(count / 8)), count - max(1, round(count / 15))
    return range(start, end) if start < end else range(count)

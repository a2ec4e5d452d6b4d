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
    "refit": "none",
    "refit_tokens": 65_536,
    "bos": False,
    "self_examples": 0,
    "hardware_align": False,
}
# Best measured without training: neurons only, in the middle layers, by second-order scores of text that the model
# writes itself, refitted afterwards in closed form on twice as much of such text.
FAST: dict[str, Any] = PAPER | {
    "taylor": "param_second",
    "calib_dataset": SELF,
    "num_examples": 128,
    "calib_seq_len": 128,
    "refit": "ridge",
    "bos": True,
    "self_examples": 128,
    "hardware_align": True,
}
# Best measured: the same, with a training of low rank behind the closed form.
BEST: dict[str, Any] = FAST | {"refit": "lora"}
PRESETS = {"best": BEST, "fast": FAST, "paper": PAPER}


def default_layers(preset: str, count: int) -> range:
    """Return the layers whose heads and neurons a preset prunes, of ``count``.

    ``paper`` spares the first three and the last; the others the first eighth and the last fifteenth, at least one on
    either side.

    >>> default_layers("paper", 32), default_layers("best", 30)
    (range(3, 31), range(4, 28))
    """
    if preset == "paper":
        return range(min(3, count - 1), count - 1)
    start, end = max(1, round(count / 8)), count - max(1, round(count / 15))
    return range(start, end) if start < end else range(count)

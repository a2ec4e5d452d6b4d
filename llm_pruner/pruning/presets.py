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
    "refit_tokens": 98_304,
    "bos": False,
    "self_examples": 0,
    "hardware_align": False,
}
# Best measured within minutes: neurons only, in the middle layers, by second-order scores, refitted in closed form and
# by a training of low rank.
FAST: dict[str, Any] = PAPER | {
    "taylor": "param_second",
    "calib_dataset": SELF,
    "num_examples": 64,
    "calib_seq_len": 128,
    "refit": "lora",
    "refit_tokens": 32_768,
    "bos": True,
    "hardware_align": True,
}
# Best measured: the same on more text, a part of which the model writes itself.
BEST: dict[str, Any] = FAST | {"num_examples": 128, "refit_tokens": PAPER["refit_tokens"], "self_examples": 128}
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

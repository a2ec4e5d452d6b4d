"""Callbacks of the Trainer: a progress bar, and the loss curves as JSON and PNG."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from ..files import strict_json, write_text
from ..logs import log
from ..optional import is_installed
from ..report.figures import draw_recoveries
from ..report.runs import Run

CURVES = "curves"


class ThroughputBar(ProgressCallback):
    """The Trainer's progress bar with losses and tokens per second on it, instead of log lines between."""

    def __init__(self) -> None:
        super().__init__()
        self._postfix: dict[str, str] = {}
        self._start = (time.perf_counter(), 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._start = time.perf_counter(), state.num_input_tokens_seen

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None:
            return
        for name, value in (logs or {}).items():
            if name == "loss":
                self._postfix["loss"] = f"{float(value):.3f}"
            elif name.startswith("eval_") and name.endswith("_loss"):
                self._postfix[name[5:-5][-20:]] = f"{float(value):.3f}"
        start, tokens = self._start
        tokens, seconds = state.num_input_tokens_seen - tokens, time.perf_counter() - start
        if tokens and seconds:
            self._postfix["tokens/s"] = f"{tokens / seconds:.0f}"
        self.training_bar.set_postfix(self._postfix, refresh=True)


class CurveWriter(TrainerCallback):
    """Write ``curves.json`` at every log entry, and ``curves.png`` at the end of training."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_text(Path(args.output_dir) / f"{CURVES}.json", strict_json(logged_curves(state.log_history)))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            draw_curves(state.log_history, Path(args.output_dir))


def logged_curves(history: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Return every logged number but times, over the steps: ``{"loss": [(step, value), ...]}``.

    >>> logged_curves([{"step": 1, "loss": 2.5, "epoch": 0.1}, {"step": 2, "loss": 2.0, "train_runtime": 9.0}])
    {'loss': [(1, 2.5), (2, 2.0)]}
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for entry in history:
        for name, value in entry.items():
            timing = name.endswith(("_runtime", "_per_second")) or name.startswith(("train_", "total_"))
            if name not in ("step", "epoch") and not timing and isinstance(value, (int, float)):
                curves.setdefault(name, []).append((entry["step"], float(value)))
    return curves


def draw_curves(history: list[dict[str, Any]], folder: Path) -> None:
    """Write the report's figure of the losses to ``curves.png``; no file without losses, or without matplotlib."""
    if not is_installed("matplotlib"):
        log.info('no %s.png: figures need matplotlib: pip install "llm_pruner[report]"', CURVES)
        return
    for drawing in draw_recoveries([Run(folder.resolve().name, folder, curves=logged_curves(history))]):
        temporary = folder / f".{CURVES}.tmp.png"
        drawing.write(temporary, "png", dpi=150)
        temporary.replace(folder / f"{CURVES}.png")

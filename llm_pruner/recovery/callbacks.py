"""Callbacks of the Trainer: its progress, and the loss curves as JSON and PNG."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..files import strict_json, write_text
from ..logs import log
from ..optional import is_installed
from ..progress import Step
from ..report.figures import draw_recoveries
from ..report.runs import CURVES, Run

FIGURE = "curves.png"
SECONDS = "train_seconds"  # of training up to a checkpoint, in its log


class TrainingProgress(TrainerCallback):
    """Progress of training with losses and tokens per second, and of a validation outside it."""

    def __init__(self) -> None:
        self._notes: dict[str, str] = {}
        self._step: Step | None = None
        self._training = False
        self._start = (time.perf_counter(), 0, 0)  # seconds, tokens and steps when training began

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter(), state.num_input_tokens_seen, state.global_step
        self._training = True
        self._begin(state, "training, steps", state.max_steps - state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._step is not None:
            self._step.done = state.global_step - self._start[2]

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._step is None:
            self._begin(state, "validating, batches")
        if self._step is not None and not self._training:
            self._step.advance()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._training:
            self._end()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = False
        self._end()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._step is None:
            return
        for name, value in (logs or {}).items():
            if name == "loss":
                self._notes["loss"] = f"{float(value):.3f}"
            elif name.startswith("eval_") and name.endswith("_loss"):
                self._notes[name[5:-5][-20:]] = f"{float(value):.3f}"
        start, tokens, _ = self._start
        tokens, seconds = state.num_input_tokens_seen - tokens, time.perf_counter() - start
        if tokens and seconds:
            self._notes["tokens/s"] = f"{tokens / seconds:.0f}"
        self._step.note = ", ".join(f"{name}={value}" for name, value in self._notes.items())

    def _begin(self, state: Any, what: str, total: int | None = None) -> None:
        if state.is_world_process_zero:
            self._step = Step(what, total).__enter__()

    def _end(self) -> None:
        if self._step is not None:
            self._step.end()
        self._step = None


class TrainingTime(TrainerCallback):
    """Seconds of training; checkpoints record them, so that those of a resumed run count too.

    Attributes:
        seconds: from the beginning of training, its interruptions left out.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._start

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before = next((entry[SECONDS] for entry in reversed(state.log_history) if SECONDS in entry), 0.0)
        self._start = time.perf_counter() - before

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            state.log_history.append({"step": state.global_step, SECONDS: round(self.seconds, 1)})


class CurveWriter(TrainerCallback):
    """Write ``curves.json`` at every log entry, and ``curves.png`` at the end of training."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_text(Path(args.output_dir) / CURVES, strict_json(logged_curves(state.log_history)))

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
        log.info('no %s: figures need matplotlib: pip install "llm_pruner[report]"', FIGURE)
        return
    for drawing in draw_recoveries([Run(folder.resolve().name, folder, curves=logged_curves(history))]):
        temporary = folder / f".tmp.{FIGURE}"
        drawing.write(temporary, "png", dpi=150)
        temporary.replace(folder / FIGURE)

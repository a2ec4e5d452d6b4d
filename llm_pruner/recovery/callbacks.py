"""What a training run logs, as a progress bar, JSON and a figure."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from ..files import write_text

CURVES = "curves"


class Progress(ProgressCallback):
    """The Trainer's bar, with loss, validation loss and throughput on it instead of lines between."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, str] = {}
        self._since = (time.perf_counter(), 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._since = time.perf_counter(), state.num_input_tokens_seen

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None:
            return
        for name, value in (logs or {}).items():
            if name == "loss":
                self._shown["loss"] = f"{float(value):.3f}"
            elif name.startswith("eval_") and name.endswith("_loss"):
                self._shown[name[5:-5][-20:]] = f"{float(value):.3f}"
        start, tokens = self._since
        seen, seconds = state.num_input_tokens_seen - tokens, time.perf_counter() - start
        if seen and seconds:
            self._shown["tokens/s"] = f"{seen / seconds:.0f}"
        self.training_bar.set_postfix(self._shown, refresh=True)


class Curves(TrainerCallback):
    """Keeps ``curves.json`` and ``curves.png`` up to date in the output folder."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_json(state.log_history, Path(args.output_dir))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            draw(state.log_history, Path(args.output_dir))


def curves(history: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Every logged number over the steps: ``{"loss": [(step, value), ...], "eval_wikitext2_loss": ...}``."""
    out: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for name, value in entry.items():
            timing = name.endswith(("_runtime", "_per_second")) or name.startswith(("train_", "total_"))
            if name not in ("step", "epoch") and not timing and isinstance(value, (int, float)):
                out.setdefault(name, []).append((entry["step"], float(value)))
    return out


def write_json(history: list[dict[str, Any]], folder: Path) -> None:
    write_text(folder / f"{CURVES}.json", json.dumps(curves(history), indent=1) + "\n")


def draw(history: list[dict[str, Any]], folder: Path) -> None:
    """The losses over the steps, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    styles = ("-", "--", ":", "-.")
    losses = {n: points for n, points in curves(history).items() if n == "loss" or n.endswith("_loss")}
    for i, (name, points) in enumerate(losses.items()):
        label = "training" if name == "loss" else name.removeprefix("eval_").removesuffix("_loss")
        axes.plot(*zip(*points, strict=True), styles[i % len(styles)], label=label, marker="." if i else None)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    if losses:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(folder / f".{CURVES}.tmp.png", dpi=150)
    (folder / f".{CURVES}.tmp.png").replace(folder / f"{CURVES}.png")

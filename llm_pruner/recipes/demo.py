"""The command ``llm-pruner demo``: the commands of a whole project in a row, without network or account."""

from __future__ import annotations

import io
import math
import shlex
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..checkpoint.load import load_with_tokenizer
from ..choices import DEFAULT_MODEL, GENERAL
from ..commands import COMMANDS
from ..evaluation.arguments import EvaluateArguments
from ..evaluation.evaluate import Evaluation, evaluate_models
from ..evaluation.run import resolve, write_evaluations
from ..evaluation.table import table
from ..evaluation.together import fit_together
from ..flags import Arguments
from ..logs import quiet_terminal
from ..tools.arguments import DemoArguments

PROMPTS = ("The capital of France is", "Water is made of")
ABOUT = (
    "SmolLM2-135M-Instruct, dequantized from a 4-bit GGUF file: its numbers do not compare with those of the base "
    "model on the hub."
)
WINDOWS, NEW_TOKENS = 16, 16
COLUMNS = ("original", "pruned", "recovered")
DECODING = "tokens/s, decoding"


@dataclass(frozen=True, kw_only=True)
class DemoStep:
    """A command of the demo: its name, its flags, and what it does in words."""

    command: str
    flags: dict[str, Any]
    purpose: str

    def line(self) -> str:
        """Return the command as a user would type it."""
        flags = self.flags.items()
        words = [f"--{name}" if value is True else f"--{name} {shlex.quote(_as_word(value))}" for name, value in flags]
        return " ".join(["llm-pruner", self.command, *words])

    def run(self) -> None:
        command = COMMANDS[self.command]
        arguments: type[Arguments] = command.arguments_class  # type: ignore[assignment]
        with quiet_terminal(True), redirect_stdout(io.StringIO()):
            command.run(arguments.of(**self.flags))


def _as_word(value: Any) -> str:
    """Return a value as a word of a command line."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def demo_steps(args: DemoArguments, folder: Path) -> list[DemoStep]:
    """Return the commands that make the demo's models in ``folder``."""
    size: dict[str, Any] = {"target_params": args.target_params}
    if args.pruning_ratio is not None:
        size = {"pruning_ratio": args.pruning_ratio}
    pruned = str(folder / "pruned")
    calibration = {"calib_dataset": GENERAL, "num_examples": 32, "calib_seq_len": 32, "self_examples": 0}
    training = {"max_steps": args.steps, "batch_size": 4, "cutoff_len": 128, "learning_rate": 1e-3, "warmup_steps": 2}
    return [
        DemoStep(
            command="prune",
            flags={"model": DEFAULT_MODEL, "output": pruned, **size, "kinds": args.kinds, "taylor": "param_first"}
            | calibration
            | {"eval_datasets": []},
            purpose="Score the neurons, remove the least important ones, refit what is left in closed form",
        ),
        DemoStep(
            command="recover",
            flags={
                "model": pruned,
                "output": str(folder / "recovered"),
                "teacher": DEFAULT_MODEL,
                "data_path": [GENERAL],
            }
            | training
            | {"val_set_size": 0, "merge": True},
            purpose="Train a LoRA adapter to imitate the original",
        ),
    ]


def run_demo(args: DemoArguments) -> None:
    """Run ``llm-pruner demo``: print each command, then original, pruned and recovered model side by side."""
    console, folder = Console(soft_wrap=True), Path(args.output or Path(args.output_root) / "demo")
    console.print(f"The model is {ABOUT}", highlight=False)
    for step in demo_steps(args, folder):
        console.print(f"\n[bold]{step.purpose}[/]\n$ {step.line()}", highlight=False)
        step.run()
    names = [DEFAULT_MODEL, str(folder / "pruned"), str(folder / "recovered" / "merged")]
    evaluate = f"$ llm-pruner evaluate {' '.join(names)} --datasets {GENERAL} --max_windows {WINDOWS}"
    console.print(f"\n[bold]Measure all three[/]\n{evaluate}\n", highlight=False)
    arguments = EvaluateArguments(model=names, datasets=[GENERAL], max_windows=WINDOWS, new_tokens=NEW_TOKENS)
    evaluations = measure_models(arguments)
    write_evaluations(evaluations, table(evaluations), folder / "evaluation", asdict(arguments))
    page = str(folder / "report.html")
    runs = [str(folder / "pruned"), str(folder / "recovered"), str(folder / "evaluation")]
    DemoStep(command="report", flags={"runs": runs, "output": page}, purpose="Write a report").run()
    console.print(comparison(evaluations))
    console.print(f"Perplexity on the text {GENERAL}, on passages that no model was calibrated or trained on.")
    console.print(f"Report: [bold]{page}[/]\nModel:  [bold]{names[-1]}[/]", highlight=False)


def measure_models(arguments: EvaluateArguments) -> list[Evaluation]:
    """Measure the models of the demo, and let them continue two prompts."""
    settings = replace(resolve(arguments), prompts=PROMPTS)
    return evaluate_models(arguments.model, load_with_tokenizer, settings, together=fit_together(arguments.model))


def comparison(evaluations: list[Evaluation]) -> Table:
    """Return the table of the demo: size, speed, perplexity and completions, side by side."""
    shown = Table("", *COLUMNS)
    rows: list[tuple[str, str, list[float]]] = [
        ("parameters", "{:,}", [one.parameters for one in evaluations]),
        ("weights, MiB", "{:.0f}", [one.weight_bytes / 2**20 for one in evaluations]),
        (DECODING, "{:.1f}", [decode_speed(one) for one in evaluations]),
        ("perplexity", "{:.2f}", [one.perplexity[GENERAL].perplexity for one in evaluations]),
    ]
    for name, form, values in rows:
        ratios = [value / values[0] for value in values]
        if name == DECODING:  # in the rounds of both models, however busy the machine was then
            paired = [one.speed.decode_ratio if one.speed else None for one in evaluations]
            ratios = [pair.median if pair else ratio for pair, ratio in zip(paired, ratios, strict=True)]
        words = ["", *(f" ({ratio:.2f}x)" for ratio in ratios[1:])]
        shown.add_row(name, *(form.format(value) + word for value, word in zip(values, words, strict=True)))
    for prompt in PROMPTS:
        shown.add_row(f"{prompt} ...", *(" ".join(one.samples[prompt].split()) for one in evaluations))
    return shown


def decode_speed(evaluation: Evaluation) -> float:
    """Return decoded tokens per second; not a number where they could not be measured."""
    decode = evaluation.speed.decode if evaluation.speed else None
    return math.nan if decode is None else decode

"""The command ``llm-pruner demo``: the commands of a whole project in a row, without network or account."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..checkpoint.load import load_with_tokenizer
from ..choices import DEFAULT_MODEL, EMBEDDED_TEXTS, GENERAL
from ..commands import COMMANDS
from ..evaluation.arguments import EvaluateArguments
from ..evaluation.evaluate import Evaluation, evaluate_models
from ..evaluation.run import resolve, write_evaluations
from ..evaluation.table import table
from ..flags import Arguments
from ..tools.arguments import DemoArguments

PROMPTS = ("The capital of France is", "Water is made of")
ABOUT = (
    "SmolLM2-135M-Instruct, dequantized from a 4-bit GGUF file: its numbers do not compare with those of the base "
    "model on the hub."
)
COLUMNS = ("original", "pruned", "recovered")


@dataclass(frozen=True, kw_only=True)
class DemoStep:
    """A command of the demo: its name, its flags, and what it does in words."""

    command: str
    flags: dict[str, Any]
    purpose: str

    def line(self) -> str:
        """Return the command as a user would type it."""
        words = [f"--{name} {shlex.quote(_as_word(value))}" for name, value in self.flags.items()]
        return " ".join(["llm-pruner", self.command, *words])

    def run(self) -> None:
        command = COMMANDS[self.command]
        arguments: type[Arguments] = command.arguments_class  # type: ignore[assignment]
        command.run(arguments.of(**self.flags, quiet=True))


def _as_word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def demo_steps(args: DemoArguments, folder: Path) -> list[DemoStep]:
    """Return the commands that make the demo's models in ``folder``."""
    texts, smaller = list(EMBEDDED_TEXTS), folder / "fewer-tokens"
    size = (
        {"target_params": args.target_params} if args.pruning_ratio is None else {"pruning_ratio": args.pruning_ratio}
    )
    return [
        DemoStep(
            command="vocab",
            flags={"model": DEFAULT_MODEL, "output": str(smaller), "corpus": texts, "keep": args.keep_tokens},
            purpose="keep the tokens that English text and code need",
        ),
        DemoStep(
            command="prune",
            flags={"model": str(smaller), "output": str(folder / "pruned"), **size, "kinds": args.kinds}
            | {"calib_dataset": GENERAL, "self_examples": 0, "eval_datasets": []},
            purpose="score, cut and refit neurons in closed form",
        ),
        DemoStep(
            command="recover",
            flags={"model": str(folder / "pruned"), "output": str(folder / "recovered"), "teacher": str(smaller)}
            | {"data_path": texts, "max_steps": args.steps, "merge": True},
            purpose="train a LoRA adapter to imitate the original",
        ),
    ]


def run_demo(args: DemoArguments) -> None:
    """Run ``llm-pruner demo``: print each command, then original, pruned and recovered model side by side."""
    console, folder = Console(), Path(args.output or Path(args.output_root) / "demo")
    console.print(f"The model is {ABOUT}\n", highlight=False)
    for step in demo_steps(args, folder):
        console.print(f"[bold]{step.purpose}[/]\n$ {step.line()}", highlight=False)
        step.run()
    names = [DEFAULT_MODEL, str(folder / "pruned"), str(folder / "recovered" / "merged")]
    console.print(f"[bold]measure[/]\n$ llm-pruner evaluate {' '.join(names)} --samples", highlight=False)
    evaluations = measure_models(names)
    write_evaluations(evaluations, table(evaluations), folder / "evaluation")
    page = folder / "report.html"
    runs = [folder / "pruned", folder / "recovered", folder / "evaluation"]
    COMMANDS["report"].run(COMMANDS["report"].arguments_class.of(runs=list(map(str, runs)), output=str(page)))
    console.print(comparison(evaluations))
    console.print(f"perplexity: {GENERAL} text, held out; no model was calibrated or trained on it", highlight=False)
    console.print(f"report: [bold]{page}[/]\nmodel: [bold]{names[-1]}[/]", highlight=False)


def measure_models(names: list[str]) -> list[Evaluation]:
    """Measure models on held-out general text, their speed, and what they say after two prompts."""
    settings = replace(resolve(EvaluateArguments(model=names, datasets=[GENERAL])), prompts=PROMPTS)
    return evaluate_models(names, load_with_tokenizer, settings)


def comparison(evaluations: list[Evaluation]) -> Table:
    """Return the table of the demo: size, speed, perplexity and completions, side by side."""
    original = evaluations[0]
    shown = Table("", *COLUMNS)
    rows = {
        "parameters": ([one.parameters for one in evaluations], "{:,}"),
        "weights, MiB": ([one.weight_bytes / 2**20 for one in evaluations], "{:.0f}"),
        "tokens/s, decoding": ([one.speed.decode if one.speed else math.nan for one in evaluations], "{:.1f}"),
        "perplexity": ([comparable_perplexity(one, original) for one in evaluations], "{:.2f}"),
    }
    for name, (values, form) in rows.items():
        ratios = ["", *(f" ({value / values[0]:.2f}x)" for value in values[1:])]
        shown.add_row(name, *(form.format(value) + ratio for value, ratio in zip(values, ratios, strict=True)))
    for prompt in PROMPTS:
        shown.add_row(f"{prompt} ...", *(" ".join(one.samples[prompt].split()) for one in evaluations))
    return shown


def comparable_perplexity(evaluation: Evaluation, original: Evaluation) -> float:
    """Return a perplexity per token of the original's tokenizer, whichever tokens the model itself has.

    The loss per byte, times the bytes in a token of the original's.
    """
    ours, theirs = (one.perplexity[GENERAL] for one in (evaluation, original))
    assert ours.byte_perplexity is not None and theirs.byte_perplexity is not None
    bytes_per_token = theirs.loss / math.log(theirs.byte_perplexity)
    return math.exp(math.log(ours.byte_perplexity) * bytes_per_token)

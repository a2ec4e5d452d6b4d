"""``llm-pruner demo``: prune the embedded model and compare both, without network or account."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ..checkpoint.load import load_with_tokenizer
from ..checkpoint.save import save
from ..choices import DEFAULT_MODEL, EMBEDDED_TEXT
from ..data import calibration, text
from ..evaluation.evaluate import Measurements, evaluate_model
from ..evaluation.table import table, terminal_table
from ..graph.units import trace
from ..importance.score import score
from ..selection.select import select
from ..surgery.apply import apply
from ..surgery.equivalence import verify
from .arguments import DemoArguments

PROMPT = "The capital of France is"
WINDOWS = 64  # for perplexity


def run_demo(args: DemoArguments) -> None:
    """Prune the embedded model, write the pruned one, and print both side by side."""
    console = Console()

    def announce(step: str) -> None:
        console.print(f"[bold]>[/] {step}")

    announce(f"loading {DEFAULT_MODEL} from its package (dequantizing takes some seconds)")
    model, tokenizer = load_with_tokenizer(DEFAULT_MODEL)
    announce("tracing: finding the axes of weights that are coupled")
    graph = trace(model)
    announce("scoring: Taylor importance on 32 samples of 64 tokens of the Python documentation")
    layers = range(3, len(model.model.layers) - 1)
    ids = calibration(EMBEDDED_TEXT, tokenizer, samples=32, tokens=64)
    scores = score(model, graph, ids, criterion="taylor", taylor="param_first", kinds=args.kinds)
    plan = select(graph, scores, ratio=args.pruning_ratio, kinds=args.kinds, layers=layers)
    announce("pruning: slicing the weights, rebuilding a smaller model from a config")
    pruned = apply(model, plan)
    report = verify(model, pruned, plan)
    for line in plan.summary().splitlines():
        console.print(f"  {line}")
    console.print(f"  same logits as the original with the removed slices zeroed: {report.equivalent}")
    target = Path(args.output or Path(args.output_root) / "demo")
    save(pruned, tokenizer, target, plan)
    announce("measuring both: perplexity on held-out text, size, speed")
    held_out = {EMBEDDED_TEXT: text(EMBEDDED_TEXT, "test")}
    settings = Measurements(texts=held_out, max_windows=WINDOWS, prompts=(PROMPT,))
    both = [evaluate_model(name, m, tokenizer, settings) for name, m in (("original", model), ("pruned", pruned))]
    console.print(terminal_table(table(both).cells()))
    for one in both:
        console.print(f"{one.model}: {PROMPT}{one.samples[PROMPT]}")
    console.print(
        f"the pruned checkpoint is in [bold]{target}[/]: AutoModelForCausalLM reads it after import llm_pruner"
    )

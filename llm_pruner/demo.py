"""``llm-pruner demo``: prune the embedded model and show what it does to it. No hub, no account."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from .arguments import DemoArguments
from .checkpoint import DEFAULT_MODEL, load, save
from .data import EMBEDDED_TEXT, calibration, text
from .evaluation import Wanted, evaluate, shown, table
from .graph import trace
from .importance import score
from .selection import select
from .surgery import apply, verify

PROMPT = "The capital of France is"
KINDS = ("heads", "neurons")
WINDOWS = 64  # for perplexity


def demo(args: DemoArguments) -> None:
    """Prune the embedded model, write the pruned one, and print both side by side."""
    console = Console()

    def step(what: str) -> None:
        console.print(f"[bold]>[/] {what}")

    step(f"loading {DEFAULT_MODEL} from its package (dequantizing takes some seconds)")
    model, tokenizer = load(DEFAULT_MODEL)
    step("tracing: which axes of which weights belong together")
    graph = trace(model)
    step("scoring: Taylor importance on 32 samples of 64 tokens of the Python documentation")
    layers = range(3, len(model.model.layers) - 1)
    ids = calibration(EMBEDDED_TEXT, tokenizer, samples=32, tokens=64)
    scores = score(model, graph, ids, criterion="taylor", taylor="param_first", kinds=KINDS)
    plan = select(graph, scores, args.pruning_ratio, KINDS, layers)
    step("pruning: slicing the weights, rebuilding a smaller model from a config")
    pruned = apply(model, plan)
    report = verify(model, pruned, plan)
    for line in plan.summary().splitlines():
        console.print(f"  {line}")
    console.print(f"  same logits as the original with the removed slices zeroed: {report.equivalent}")
    target = Path(args.output_root) / "demo"
    save(pruned, tokenizer, target, plan)
    step("measuring both: perplexity on held-out text, size, speed")
    wanted = Wanted({EMBEDDED_TEXT: text(EMBEDDED_TEXT, "test")}, max_windows=WINDOWS, prompts=(PROMPT,))
    both = [evaluate(name, m, tokenizer, wanted) for name, m in (("original", model), ("pruned", pruned))]
    console.print(shown(table(both).cells()))
    for one in both:
        console.print(f"{one.model}: {PROMPT}{one.samples[PROMPT]}")
    console.print(
        f"the pruned checkpoint is in [bold]{target}[/]: AutoModelForCausalLM reads it after import llm_pruner"
    )

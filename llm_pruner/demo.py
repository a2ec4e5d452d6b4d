"""``llm-pruner demo``: prune the embedded model and show what it does to it. No hub, no account."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arguments import DemoArguments
from .checkpoint import DEFAULT_MODEL, load, save
from .data import EMBEDDED_TEXT, calibration, text
from .evaluation import parameter_count, perplexity, windows
from .graph import trace
from .importance import score
from .selection import select
from .surgery import apply, verify

PROMPT = "The capital of France is"
KINDS = ("heads", "neurons")


def demo(args: DemoArguments) -> None:
    """Prune the embedded model and print both models side by side."""
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
    held_out = windows(tokenizer, text(EMBEDDED_TEXT, "test"), 128, 64)
    with TemporaryDirectory() as folder:  # only to weigh it
        save(model, None, Path(folder) / "original")
        before = measure(model, tokenizer, held_out, Path(folder) / "original")
    after = measure(pruned, tokenizer, held_out, target)
    table = Table("", "original", "pruned", "ratio")
    for name, form in (
        ("parameters", "{:,}"),
        ("perplexity", "{:.2f}"),
        ("MiB on disk", "{:.1f}"),
        ("tokens/s, prefill", "{:.0f}"),
        ("tokens/s, decode", "{:.1f}"),
    ):
        table.add_row(name, form.format(before[name]), form.format(after[name]), f"{after[name] / before[name]:.3f}")
    console.print(table)
    console.print(f"original: {before['text']}")
    console.print(f"pruned:   {after['text']}")
    console.print(
        f"the pruned checkpoint is in [bold]{target}[/]: AutoModelForCausalLM reads it after import llm_pruner"
    )


@torch.no_grad()
def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: torch.Tensor, folder: Path
) -> dict[str, Any]:
    """One column of the table."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    generate = {"do_sample": False, "max_new_tokens": 24, "min_new_tokens": 24, "pad_token_id": tokenizer.eos_token_id}
    cast(Any, model).generate(**inputs, **{**generate, "max_new_tokens": 2, "min_new_tokens": 2})  # warm up
    start = time.perf_counter()
    out = cast(Any, model).generate(**inputs, **generate)
    decode = 24 / (time.perf_counter() - start)
    start = time.perf_counter()
    result = perplexity(model, held_out)
    prefill = held_out.numel() / (time.perf_counter() - start)
    return {
        "parameters": parameter_count(model),
        "perplexity": result.perplexity,
        "MiB on disk": sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 2**20,
        "tokens/s, prefill": prefill,
        "tokens/s, decode": decode,
        "text": tokenizer.decode(out[0], skip_special_tokens=True),
    }

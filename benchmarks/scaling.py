"""Cost of each step of pruning in forward passes, by width of the model: what the estimates of scaling.md rest on.

    python benchmarks/scaling.py [--shapes 0.1b 7b] [--output FILE.json]

Every shape has two layers of random weights and a small vocabulary, since the cost grows linearly with the layers.
All steps read the same tokens, and each is timed between two forward passes of its own arithmetic, whose mean is the
unit. The closed form also solves systems of equations, whatever the number of tokens; twice as many tokens tell them
apart (``ridge, per token`` and ``ridge, solving``). CPU seconds are counted, so that waiting does not matter.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import llm_pruner as lp
from llm_pruner.models.arithmetic import narrow_arithmetic
from llm_pruner.provenance import provenance
from llm_pruner.refit.budget import Budget
from llm_pruner.refit.lora import lora

SHAPES = {  # hidden size, neurons, heads, key-value heads
    "0.1b": (576, 1536, 9, 3),
    "0.5b": (896, 4864, 14, 2),
    "1b": (2048, 5504, 16, 16),
    "3b": (3072, 8192, 24, 8),
    "7b": (4096, 11008, 32, 32),
}
SAMPLES, TOKENS, LAYERS = 32, 64, 2


def build(shape: str) -> LlamaForCausalLM:
    """A model of two layers as wide as the shape."""
    hidden, neurons, heads, key_value_heads = SHAPES[shape]
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=hidden,
            intermediate_size=neurons,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            num_hidden_layers=LAYERS,
        )
    ).eval()


def seconds(step: Callable[[], object]) -> float:
    """CPU seconds of a step."""
    start = time.process_time()
    step()
    return time.process_time() - start


def measure(shape: str) -> dict[str, float]:
    """Return the cost of every step in forward passes of the same tokens."""
    model = build(shape)
    ids = torch.randint(1024, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
    graph = lp.trace(model)

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)

    def plan(taylor: str) -> lp.PruningPlan:
        scores = lp.score(model, graph, ids, taylor=taylor, kinds=("neurons",))
        return lp.select(graph, scores, 0.25, ("neurons",))

    chosen = plan("param_first")
    pruned = lp.apply(model, chosen)
    steps: dict[str, Callable[[], object]] = {
        "param_first": lambda: plan("param_first"),
        "param_second": lambda: plan("param_second"),
        "apply": lambda: lp.apply(model, chosen),
        "ridge": lambda: lp.compensate(model, pruned, ids),
        "ridge, twice": lambda: lp.compensate(model, pruned, torch.cat([ids, ids])),
        "lora": lambda: lora(model, pruned, ids, Budget(tokens=SAMPLES * TOKENS)),
    }
    ratios = {}
    for name, step in steps.items():
        with narrow_arithmetic(model.device):
            forward()
            before, own, after = seconds(forward), seconds(step), seconds(forward)
        ratios[name] = round(2 * own / (before + after), 2)
        print(shape, name, ratios[name], round(own, 2), flush=True)
    once, twice = ratios.pop("ridge"), ratios.pop("ridge, twice")
    return ratios | {"ridge, per token": round(twice - once, 2), "ridge, solving": round(2 * once - twice, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    record = {"forward_passes": {shape: measure(shape) for shape in options.shapes}, **provenance()}
    print(json.dumps(record, indent=1))
    if options.output:
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

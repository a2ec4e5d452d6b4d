"""Cost of each step of pruning in forward passes, by width of the model: what the estimates of scaling.md rest on.

    python benchmarks/scaling.py [--shapes 0.1b 3b] [--output FILE.json]
    python benchmarks/scaling.py --print

``--print`` prints the tables of the page: the costs, the estimates that follow for SmolLM2-135M beside what the presets
took (``presets.json``), and those for large models on a GPU that trains as fast as in ``gpu.json``.

Every shape has two layers of random weights and a small vocabulary, since the cost grows linearly with the layers.
All steps read the same tokens, and each is timed between two forward passes of its own arithmetic, whose mean is the
unit. The closed form also solves systems of equations, whatever the number of tokens; four times as many tokens tell
them apart (``ridge, per token`` and ``ridge, solving``). CPU seconds are counted, so that waiting does not matter.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from presets import MACHINE
from transformers import LlamaConfig, LlamaForCausalLM

import llm_pruner as lp
from llm_pruner.evaluation.tabular import markdown
from llm_pruner.models.arithmetic import narrow_arithmetic
from llm_pruner.provenance import provenance
from llm_pruner.refit.budget import Budget
from llm_pruner.refit.lora import lora

SHAPES = {  # hidden size, neurons, heads, key-value heads
    "0.1b": (576, 1536, 9, 3),
    "0.5b": (896, 4864, 14, 2),
    "1b": (2048, 5504, 16, 16),
    "3b": (3072, 8192, 24, 8),
}
SAMPLES, TOKENS, LAYERS = 32, 64, 2
RESULTS = Path(__file__).parent / "results"
RIDGE = ("ridge, per token", "ridge, solving")
# Tokens that each preset scores, refits in closed form and trains on.
PRESETS = {"fast": (8_192, 8_192, 32_768), "best": (16_384, 32_768, 98_304)}
LARGE = {"7B": (6.74e9, 11_008), "70B": (69e9, 28_672), "405B": (405.9e9, 53_248)}  # Llama's parameters and neurons
SMOLLM2 = (134_515_008, 1536)


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
        "ridge, four times": lambda: lp.compensate(model, pruned, ids.repeat(4, 1)),
        "lora": lambda: lora(model, pruned, ids, Budget(tokens=SAMPLES * TOKENS)),
    }
    ratios: dict[str, float] = {}
    for name, step in steps.items():
        with narrow_arithmetic(model.device):
            forward()
            before, own, after = seconds(forward), seconds(step), seconds(forward)
        ratios[name] = round(2 * own / (before + after), 2)
        print(shape, name, ratios[name], round(own, 2), flush=True)
    once, more = ratios.pop("ridge"), ratios.pop("ridge, four times")
    ratios |= dict(zip(RIDGE, (round((more - once) / 3, 2), round((4 * once - more) / 3, 2)), strict=True))
    operations = 2 * SAMPLES * TOKENS * sum(p.numel() for p in model.parameters())
    return ratios | {"gflops": round(2 * operations / (before + after) / 1e9)}


def steps_of(
    preset: str, passes: dict[str, dict[str, float]], shape: str, model: tuple[float, int], *, rate: float
) -> dict[str, float]:
    """Return the seconds of the steps of a preset on a model, by the costs of a shape and operations per second."""
    costs = passes[shape]
    score, ridge, train = PRESETS[preset]
    parameters, neurons = model
    second = 2 * parameters / rate  # of a token's forward pass
    wider = neurons / SHAPES[shape][1]  # solving takes the third power of the width, all weights its square
    return {
        "score": costs["param_second"] * score * second,
        "compensate": (costs[RIDGE[0]] * ridge + wider * costs[RIDGE[1]] * SAMPLES * TOKENS) * second,
        "refit": costs["lora"] * train * second,
    }


def tables() -> str:
    """Return the tables of the page in Markdown."""
    costs, presets, gpu = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("scaling", "presets", "gpu"))
    passes = costs["forward_passes"]
    first = [["step", *passes]]
    steps = [step for step in passes["0.1b"] if step != "gflops"]
    first += [[step, *(f"{costs[step]:.1f}" for costs in passes.values())] for step in steps]
    first += [["gflops", *(str(costs["gflops"]) for costs in passes.values())]]
    second = [["preset", "step", "estimated s", "measured s", "ratio"]]
    for row in presets["rows"]:
        if row["machine"] == MACHINE and row["method"] in PRESETS and row["model"] == "smollm2-135m":
            estimates = steps_of(row["method"], passes, "0.1b", SMOLLM2, rate=2e9 * passes["0.1b"]["gflops"])
            for step, seconds in estimates.items():
                measured = row["seconds"][step]
                cells = [f"{seconds:.0f}", f"{measured:.0f}", f"{seconds / measured:.2f}"]
                second.append([f"`{row['method']}` at {row['size']}", step, *cells])
    rate = 6 * gpu["parameters"] * 640 / gpu["plain_step_seconds"]  # forward and backward pass of 10 x 64 tokens
    third = [["preset", *LARGE]]
    for preset in PRESETS:
        whole = [sum(steps_of(preset, passes, "3b", size, rate=rate).values()) / 60 for size in LARGE.values()]
        third.append([f"`{preset}`", *(f"{minutes:.1f} min" for minutes in whole)])
    return "\n\n".join(markdown(cells) for cells in (first, second, third))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling.json")
    parser.add_argument("--print", action="store_true", help="print the tables of the results")
    options = parser.parse_args()
    if options.print:
        print(tables())
        return
    record: dict = {"forward_passes": {}, **provenance()}
    for shape in options.shapes:
        record["forward_passes"][shape] = measure(shape)
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

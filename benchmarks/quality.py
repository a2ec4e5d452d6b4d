"""Perplexity of the embedded model after LLM-Pruner's criteria, without any training.

    python benchmarks/quality.py --calibration C4.jsonl --evaluation wikitext2_test.txt [--output FILE.json]

The settings of the paper's recipe on this model: layers 4 to 27, the first 10 calibration samples of 64 tokens,
256 windows of 128 tokens. The rows named ``folded`` redo what LLM-Pruner's code does on grouped attention: it
adds the scores of query heads onto key-value heads by position modulo their number, so a group is judged by
query heads that are not its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import llm_pruner as lp
from llm_pruner.data import calibration, text
from llm_pruner.evaluation.perplexity import perplexity, windows
from llm_pruner.models.skeleton import parameter_count

KINDS, LAYERS = ("heads", "neurons"), range(4, 28)
ROWS = (
    ("param_first", {"taylor": "param_first"}, 0.34, False),
    ("param_first, folded", {"taylor": "param_first"}, 0.34, True),
    ("param_second", {"taylor": "param_second"}, 0.34, False),
    ("param_second, folded", {"taylor": "param_second"}, 0.34, True),
    ("param_mix", {"taylor": "param_mix"}, 0.34, False),
    ("vectorize", {"taylor": "vectorize"}, 0.34, False),
    ("l2", {"criterion": "l2"}, 0.34, False),
    ("random", {"criterion": "random"}, 0.34, False),
    ("param_first", {"taylor": "param_first"}, 0.5, False),
    ("param_second", {"taylor": "param_second"}, 0.5, False),
)


def folded(
    graph: lp.CouplingGraph, model: torch.nn.Module, ids: torch.Tensor, scores: lp.Scores, options: dict
) -> None:
    """Replace the heads' scores by LLM-Pruner's: query head i counts for key-value head i modulo their number."""
    from llm_pruner.importance.aggregate import dims_to_score
    from llm_pruner.importance.taylor import taylor

    ranks = {name: len(shape) for name, shape in graph.shapes.items()}
    heads = graph.of_kind("heads")
    salience = taylor(model, dims_to_score(heads, ranks), ids, options["taylor"])
    for unit in heads:
        total = torch.zeros(unit.size, unit.width, dtype=torch.float64)
        for key in unit.dims:
            total += salience[key].double().view(-1, unit.size, unit.width).sum(0)
        scores.values[unit.name] = total.sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", default="python-docs")
    parser.add_argument("--evaluation", default="python-docs")
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    model, tokenizer = lp.load("smollm2-135m")
    ids = calibration(args.calibration, tokenizer, 10, 64)
    held_out = windows(tokenizer, text(args.evaluation), 128, args.windows)
    graph = lp.trace(model)
    size = parameter_count(model)
    results = [{"row": "unpruned", "ratio": 0, "parameters": 1.0, "perplexity": perplexity(model, held_out).perplexity}]
    print(results[0], flush=True)
    for name, options, ratio, fold in ROWS:
        scores = lp.score(model, graph, ids, kinds=KINDS, **options)
        if fold:
            folded(graph, model, ids, scores, options)
        pruned = lp.apply(model, lp.select(graph, scores, ratio, KINDS, layers=LAYERS))
        share = round(parameter_count(pruned) / size, 4)
        result = {"row": name, "ratio": ratio, "parameters": share}
        results.append(result | {"perplexity": perplexity(pruned, held_out).perplexity})
        print(results[-1], flush=True)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Compare layers of different widths with layers of one width: perplexity at the same size, without any training.

    python benchmarks/uniform.py --models smollm2-135m --seeds 42 43 44 --c4 c4.jsonl --wikitext2 wikitext2_test.txt

Each model is pruned as by ``llm-pruner prune --target_params SIZE``, with and without ``--uniform``: both plans share
the calibration set, the scores and the samples of the refit. A seed draws the text that the model writes itself.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

import llm_pruner as lp
from llm_pruner.data import self_calibration, self_written, text
from llm_pruner.evaluation.perplexity import perplexity, windows
from llm_pruner.models.skeleton import parameter_count
from llm_pruner.provenance import provenance
from llm_pruner.pruning.presets import BEST, default_layers

TOKENS = 128  # per window of the texts that are measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--sizes", nargs="+", type=float, default=[0.8, 0.7])
    parser.add_argument("--c4", required=True, help="file of documents")
    parser.add_argument("--wikitext2", required=True, help="file of text")
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    machine = torch.cuda.get_device_name() if options.device != "cpu" else platform.machine()
    rows: list[dict[str, Any]] = []
    for name in options.models:
        for seed in options.seeds:
            for row in measure(name, seed, options):
                rows.append(row)
                print(json.dumps(row), flush=True)
                if options.output:
                    record = {"rows": rows, "machine": machine, **provenance()}
                    options.output.write_text(json.dumps(record, indent=1) + "\n")


def measure(name: str, seed: int, options: argparse.Namespace) -> Any:
    """Yield a row for the unpruned model, then for each size and for layers that differ or not."""
    model, tokenizer = lp.load(name, "float32", options.device)
    texts = {
        label: windows(tokenizer, text(file), TOKENS, options.windows).to(options.device)
        for label, file in (("WikiText-2", options.wikitext2), ("C4", options.c4))
    }

    def perplexities(subject: Any) -> dict[str, float]:
        return {label: round(perplexity(subject, ids, 16).perplexity, 2) for label, ids in texts.items()}

    yield {"model": Path(name).stem, "seed": seed, "size": 1.0, "perplexity": perplexities(model)}
    graph, whole = lp.trace(model), parameter_count(model)
    started = time.perf_counter()
    ids = self_written(model, tokenizer, BEST["num_examples"], BEST["calib_seq_len"], seed=seed)
    refit = torch.cat([self_calibration(model, ids, BEST["self_examples"], seed), ids])
    scores = lp.score(model, graph, ids.to(options.device), taylor=BEST["taylor"], kinds=("neurons",))
    seconds = time.perf_counter() - started
    layers = default_layers("best", model.config.num_hidden_layers)
    for size in options.sizes:
        for uniform in (False, True):
            plan = lp.select(
                graph,
                scores,
                kinds=("neurons",),
                layers=None if uniform else layers,
                target_params=size,
                align=True,
                uniform=uniform,
            )
            pruned = lp.apply(model, plan)
            started = time.perf_counter()
            lp.compensate(model, pruned, refit.to(options.device))
            yield {
                "model": Path(name).stem,
                "seed": seed,
                "size": size,
                "uniform": uniform,
                "parameters": round(parameter_count(pruned) / whole, 4),
                "perplexity": perplexities(pruned),
                "seconds": round(seconds + time.perf_counter() - started, 1),
            }


if __name__ == "__main__":
    main()

"""Cost of measuring: perplexity against bare batched forward passes, and a report of 50 runs.

python benchmarks/evaluation.py --output results/evaluation.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import llm_pruner as lp
from llm_pruner.data import text
from llm_pruner.evaluation.perplexity import perplexity, windows
from llm_pruner.importance.scores import SCORES_FILE, Scores
from llm_pruner.report.arguments import ReportArguments
from llm_pruner.report.page import write_report
from llm_pruner.selection.plan import Choice, PruningPlan

BATCH, WINDOWS, PAIRS = 8, 32, 5
RUNS, LAYERS, NEURONS = 50, 30, 1536


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found = {"machine": f"CPU, {torch.get_num_threads()} threads", "perplexity": reading(), "report": drawing()}
    print(json.dumps(found))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


@torch.no_grad()
def reading() -> dict[str, Any]:
    """Seconds of perplexity and of the model's forward passes alone, in turn, on the embedded model."""
    model, tokenizer = lp.load("smollm2-135m")
    ids = windows(tokenizer, text("python-docs", "test"), 128, WINDOWS)
    ours, bare = [], []
    for _ in range(PAIRS + 1):
        start = time.perf_counter()
        for batch in ids.split(BATCH):
            model(batch, use_cache=False)
        bare.append(time.perf_counter() - start)
        start = time.perf_counter()
        perplexity(model, ids, BATCH)
        ours.append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(ours[1:], bare[1:], strict=True)]
    return {"windows": WINDOWS, "batch": BATCH, "ratio": round(statistics.median(ratios), 3), "ratios": ratios}


def drawing() -> dict[str, Any]:
    """Seconds and size of a report of runs as large as the embedded model's."""
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folders = []
        for i in range(RUNS):
            folder = Path(scratch) / f"run{i}"
            folder.mkdir()
            scores, plan = Scores({}), PruningPlan()
            for layer in range(LAYERS):
                name = f"model.layers.{layer}.mlp.neurons"
                scores.values[name] = torch.rand(NEURONS, generator=generator, dtype=torch.float64)
                kept = scores.values[name].topk(NEURONS - 10 * (i + 1)).indices.sort().values
                plan.units[name] = Choice("neurons", layer, NEURONS, kept)
                plan.units[name].explain(scores.values[name])
            scores.save(folder / SCORES_FILE)
            plan.save(folder / "pruning_plan.json")
            sides = {
                when: {"perplexity": {"text": {"perplexity": 50.0 + i * n, "tokens": 127, "seq_len": 128}}}
                for n, when in enumerate(("before", "after"))
            }
            metrics = {"parameters_before": 10**8, "parameters_after": 10**8 - 10**6 * i, **sides}
            (folder / "metrics.json").write_text(json.dumps({**metrics, "arguments": {"base_model": "model"}}))
            folders.append(str(folder))
        page = f"{scratch}/report.html"
        start = time.perf_counter()
        write_report(ReportArguments(runs=folders, output=page))
        seconds = time.perf_counter() - start
        return {"runs": RUNS, "seconds": round(seconds, 2), "mib": round(Path(page).stat().st_size / 2**20, 2)}


if __name__ == "__main__":
    main()

"""Measure what the presets keep for their minutes: perplexity on two texts after `llm-pruner prune`.

    python benchmarks/presets.py --runs FOLDER --c4 c4.jsonl --texts wikitext2_test.txt alpaca.jsonl [--sizes 0.786]

Each row is one run of the command in a process of its own; a run whose folder is finished is not repeated. The texts
are measured in windows of 128 tokens. With `--print`, the tables of docs/explanation/choosing.md are printed from the
results, and nothing is run: means over seeds, and the minutes of runs on all cores of the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from llm_pruner.evaluation.tabular import markdown
from llm_pruner.provenance import provenance, versions

RESULTS = Path(__file__).parent / "results" / "presets.json"
METHODS = {
    "paper": ["--preset", "paper"],
    "ridge": ["--refit", "ridge"],
    "fast": ["--preset", "fast"],
    "best": ["--preset", "best"],
    "best-26-layers": ["--preset", "best", "--num_layers", "26", "--depth", "block_influence"],  # of SmolLM2's 30
}
MACHINE = "x86_64, 2 threads"  # whose minutes the tables show
MEASURING = ("perplexity", "verify")  # stages that are no part of the pruning


def run(method: str, model: str, size: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run the command unless its folder is finished; return its row."""
    text = "c4" if options.c4 else "self"
    folder = options.runs / f"{Path(model).stem}-{method}-{size}-{text}-{seed}"
    metrics = folder / "metrics.json"
    if not metrics.is_file():
        command = [sys.executable, "-m", "llm_pruner", "prune", model, str(folder), *METHODS[method]]
        command += ["--target_params", size, "--seed", str(seed), "--max_windows", str(options.windows)]
        command += ["--eval_datasets", *options.texts, *(["--calib_dataset", options.c4] if options.c4 else [])]
        subprocess.run(command, check=True)
    record = json.loads(metrics.read_text())
    seconds = {stage: value for stage, value in record["seconds"].items() if stage not in MEASURING}
    perplexities = {
        when: {Path(name).stem: round(one["perplexity"], 2) for name, one in record[when]["perplexity"].items()}
        for when in ("before", "after")
    }
    row = {"model": Path(model).stem, "method": method, "size": size, "text": text, "seed": seed}
    row |= {"parameters": round(record["parameters_ratio"], 4), "minutes": round(sum(seconds.values()) / 60, 1)}
    row |= {"machine": record["machine"], "windows": options.windows}
    return row | {"seconds": seconds, "peak_rss_gib": record["peak_rss_gib"], **perplexities}


def table(rows: list[dict[str, Any]], model: str) -> str:
    """Return the table of a model in Markdown."""
    mine = [row for row in rows if row["model"] == model]
    texts = list(mine[0]["before"])
    cells = [[f"size of {model}", "method", "calibration text", "minutes", *texts]]
    cells += [["1", "unpruned", "", "", *(f"{mine[0]['before'][text]:.1f}" for text in texts)]]
    order = list(METHODS)
    for size, origin, method in sorted(
        {(row["size"], row["text"], row["method"]) for row in mine},
        key=lambda key: (-float(key[0]), key[1], order.index(key[2])),
    ):
        runs = [row for row in mine if (row["size"], row["text"], row["method"]) == (size, origin, method)]
        minutes = [row["minutes"] for row in runs if row["machine"] == MACHINE]
        measured = [[row["after"][text] for row in runs if text in row["after"]] for text in texts]
        values = [mean_and_deviation(of_text) if of_text else "" for of_text in measured]
        shown = f"{statistics.median(minutes)}" if minutes else ""
        cells.append([size, f"`{' '.join(METHODS[method])}`", origin, shown, *values])
    return markdown(cells)


def mean_and_deviation(values: list[float]) -> str:
    """Return the mean, and the standard deviation of several values."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"])
    parser.add_argument("--methods", nargs="+", default=["paper", "ridge", "fast", "best"], choices=list(METHODS))
    parser.add_argument("--sizes", nargs="+", default=["0.786"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--c4", help="file of documents to calibrate on (default: the model writes its own text)")
    parser.add_argument("--texts", nargs="+", default=["general"], help="files of texts to measure")
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--runs", type=Path, help="folder of the runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file, whose other rows stay")
    parser.add_argument("--print", action="store_true", help="print the tables of the results")
    options = parser.parse_args()
    known = json.loads(options.output.read_text())["rows"] if options.output.is_file() else []
    if options.print:
        print("\n".join(table(known, model) for model in dict.fromkeys(row["model"] for row in known)))
        return
    for model in options.models:
        for size in options.sizes:
            for seed in options.seeds:
                for method in options.methods:
                    row = run(method, model, size, seed, options)
                    key = ("model", "method", "size", "text", "seed")
                    known = [other for other in known if any(other[k] != row[k] for k in key)] + [row]
                    record = {"rows": known, "machine": provenance()["machine"], "versions": versions()}
                    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

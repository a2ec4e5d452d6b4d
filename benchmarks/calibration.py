"""Compare calibration texts: perplexity after `llm-pruner prune`, without any training.

    python benchmarks/calibration.py --models smollm2-135m --c4 c4.jsonl --wikitext2 wikitext2_test.txt

Every text is used as the command uses it: for scores, and for the refit besides as many samples that the model writes
itself. The models are measured on WikiText-2 and on the last third of the C4
documents, in windows of 128 tokens; the first two thirds are the calibration text `c4`.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path

import torch

import llm_pruner as lp
from llm_pruner.data import documents
from llm_pruner.provenance import provenance

TEXTS = ("self", "general", "python-docs", "c4")


def split_documents(file: str, folder: Path) -> dict[str, str]:
    """Write the calibration and the held-out part of a file of documents; return their paths."""
    texts = list(documents(file))
    parts = {"calibration": texts[: len(texts) * 2 // 3], "held_out": texts[len(texts) * 2 // 3 :]}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return {name: str(folder / f"{name}.jsonl") for name in parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"])
    parser.add_argument("--texts", nargs="+", default=list(TEXTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--num_examples", type=int, default=128, help="samples of the text, and as many self-written")
    parser.add_argument("--max_windows", type=int, default=256)
    parser.add_argument("--target_params", default="0.786")
    parser.add_argument("--c4", required=True, help="file of documents")
    parser.add_argument("--wikitext2", required=True, help="file of text")
    parser.add_argument("--output", help="JSON file")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        c4 = split_documents(options.c4, Path(folder))
        measured = {"WikiText-2": options.wikitext2, "C4": c4["held_out"]}
        for model in options.models:
            for text in options.texts:
                for seed in options.seeds:
                    row = {"model": model, "text": text, "seed": seed}
                    flags = {"calib_dataset": c4["calibration"] if text == "c4" else text, "seed": seed}
                    samples = {"num_examples": options.num_examples, "self_examples": options.num_examples}
                    run = lp.prune(
                        model,
                        target_params=options.target_params,
                        refit="ridge",
                        eval_datasets=list(measured.values()),
                        max_windows=options.max_windows,
                        progress=lambda *_: None,
                        **flags,
                        **samples,
                    )
                    for name, file in measured.items():
                        row[f"{name} before"] = round(run.metrics["before"]["perplexity"][file]["perplexity"], 2)
                        row[name] = round(run.metrics["after"]["perplexity"][file]["perplexity"], 2)
                    row["parameters"] = round(run.metrics["parameters_ratio"], 4)
                    row["seconds"] = run.metrics["seconds"]
                    rows.append(row)
                    print(json.dumps(row), flush=True)
    if options.output:
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        record = {"rows": rows, "machine": machine, **provenance()}
        Path(options.output).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

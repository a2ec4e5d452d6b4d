"""Measure each choice of method on the embedded model, without any training.

The table of docs/explanation/choosing.md is its output.

    python benchmarks/choosing.py --calibration C4.jsonl --evaluation wikitext2_test.txt [--device cuda]

One choice after the other is varied around the preset ``best`` without the samples that the model writes itself (the
last choice): criterion, aggregation, compensation, scope, kinds and
calibration set, each at three sizes of the pruned model. Perplexity is measured on the text given (256 windows of 128
tokens) and on Python's documentation (128 windows), so that no choice is tuned to one text.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import llm_pruner as lp
from llm_pruner.choices import PYTHON_DOCS
from llm_pruner.data import calibration, self_calibration, text
from llm_pruner.evaluation.perplexity import perplexity, windows
from llm_pruner.models.skeleton import parameter_count
from llm_pruner.pruning.presets import BEST, default_layers

SIZES = (0.786, 0.711, 0.9)
SAMPLES, TOKENS = BEST["num_examples"], BEST["calib_seq_len"]
USUAL: dict[str, Any] = {
    "criterion": "taylor",
    "taylor": BEST["taylor"],
    "aggregation": "sum",
    "scope": "local",
    "kinds": ("neurons",),
    "compensate": True,
    "samples": SAMPLES,
    "self_examples": 0,
}
SECOND, FIRST = {"taylor": "param_second"}, {"taylor": "param_first"}
CRITERIA = [SECOND, FIRST, {"taylor": "param_mix"}, {"taylor": "vectorize"}]
CRITERIA += [{"criterion": name} for name in ("wanda", "flap", "activation", "l2", "l1", "random")]


def rows() -> list[dict[str, Any]]:
    """The settings to measure, each as what differs from ``best``."""
    out: list[dict[str, Any]] = [{**c, "compensate": compensate} for c in CRITERIA[:2] for compensate in (True, False)]
    out += [{"scope": "global", **c} for c in (SECOND, FIRST)]
    out += [{"self_examples": BEST["self_examples"]}]
    out += [{"samples": n} for n in (32, 64)]
    out += [{"kinds": ("heads", "neurons")}]
    out += [{"aggregation": name} for name in ("mean", "max", "prod", "first", "last")]
    out += [{**c, "compensate": compensate} for c in CRITERIA[2:] for compensate in (True, False)]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default=PYTHON_DOCS)
    parser.add_argument("--evaluation", default=PYTHON_DOCS)
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after these")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    started = time.perf_counter()
    model, tokenizer = lp.load(args.model, "float32", args.device)
    ids = calibration(args.calibration, tokenizer, SAMPLES, TOKENS)
    texts = {
        Path(args.evaluation).stem: windows(tokenizer, text(args.evaluation), 128, args.windows),
        "python-docs": windows(tokenizer, text(PYTHON_DOCS, "test"), 128, 128),
    }
    graph = lp.trace(model)
    layers = default_layers("best", model.config.num_hidden_layers)
    whole = parameter_count(model)
    machine = torch.cuda.get_device_name() if args.device != "cpu" else f"CPU, {torch.get_num_threads()} threads"
    results: list[dict[str, Any]] = []

    def measured(subject: Any, **what: Any) -> None:
        found = {name: round(perplexity(subject, held_out, 16).perplexity, 1) for name, held_out in texts.items()}
        results.append({**what, "perplexity": found})
        print(json.dumps(results[-1]), flush=True)
        if args.output:
            document = {"machine": machine, "usual": USUAL, "layers": list(layers), "rows": results}
            args.output.write_text(json.dumps(document, indent=1) + "\n")

    measured(model, differs={}, target=1.0, parameters=1.0)
    known: dict[str, lp.Scores] = {}
    for differs in rows():
        row = USUAL | differs
        key = json.dumps([row[name] for name in ("criterion", "taylor", "aggregation", "samples")])
        if key not in known:
            known[key] = lp.score(
                model,
                graph,
                ids[: row["samples"]],
                row["criterion"],
                taylor=row["taylor"],
                aggregation=row["aggregation"],
                kinds=("heads", "neurons"),
            )
        for size in map(float, args.sizes.split(",")):
            if time.perf_counter() - started > 60 * args.minutes:
                return
            clock = time.perf_counter()
            plan = lp.select(
                graph, known[key], kinds=row["kinds"], layers=layers, scope=row["scope"], target_params=size
            )
            pruned = lp.apply(model, plan)
            refit_on = ids[: row["samples"]]
            if row["self_examples"]:
                refit_on = torch.cat([self_calibration(model, refit_on, row["self_examples"]), refit_on])
            report = lp.compensate(model, pruned, refit_on) if row["compensate"] else None
            seconds = round(time.perf_counter() - clock, 1)
            share = round(parameter_count(pruned) / whole, 4)
            scaled = report.temperature if report else None
            measured(pruned, differs=differs, target=size, parameters=share, temperature=scaled, seconds=seconds)


if __name__ == "__main__":
    main()

"""Prune one model by each tool to the same sizes, in turns, and measure all results by one evaluator.

    python benchmarks/peers/environments.py ENVIRONMENTS
    git clone https://github.com/horseee/LLM-Pruner
    python benchmarks/peers/compare.py smollm2-135m --text C4.jsonl --evaluation wikitext2_test.txt alpaca.jsonl \\
        --environments ENVIRONMENTS --source LLM-Pruner --work FOLDER --output results/peers.json

The small calibration set is LLM-Pruner's, 10 samples of 64 tokens; the large one has 128 tokens a sample. Every tool
gets the same tokens. Seconds are CPU seconds of one thread, which a busy machine raises less than those of the clock.
Rows that the output holds, and rounds that the folder of --work holds, are not run again: a comparison can be spread
over several calls.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from environments import REQUIREMENTS
from rows import REFERENCE, ROWS, Calibration, Row, command, interpreter
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer

import llm_pruner as lp
from llm_pruner.data import calibration, text
from llm_pruner.evaluation.perplexity import perplexity, windows
from llm_pruner.models.per_layer import has_per_layer_widths
from llm_pruner.models.skeleton import parameter_count
from llm_pruner.provenance import versions

WINDOW_TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    for name in ("text", "environments", "source", "work", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, nargs="+", required=True)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.9, 0.8])
    parser.add_argument("--rows", nargs="+", default=[row.name for row in ROWS])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each row, in turns")
    parser.add_argument("--samples", type=int, default=64, help="samples of the large calibration set")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--prefix", default="", help="words before each command, as in 'taskset -c 1'")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds until a tool counts as not returning")
    args = parser.parse_args()
    records = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    folder = original(args.model, args.work)
    sets = calibration_sets(folder, args)
    if not any(record["model"] == folder.name for record in records):
        records.append({"model": folder.name, "tool": "unpruned"} | quality(folder, args))
    for target in args.targets:
        done = {record["row"] for record in records if (record["model"], record.get("target")) == (folder.name, target)}
        rows = [row for row in ROWS if row.name in args.rows and row.name not in done]
        costs = run_rows(rows, folder, sets, args, target=target)
        for row in rows:
            output = output_of(row, folder, args.work, target)
            records.append(
                {"model": folder.name, "target": target, "row": row.name, "tool": row.tool, "method": row.method}
                | {"calibration": tokens_of(sets[row.calibration]) if row.calibration else "none"}
                | summary(costs[row.name])
                | (quality_or_error(output, args) if "error" not in costs[row.name][-1] else {})
            )
            print(records[-1], flush=True)
            write(args.output, records)
    print(table(records))


def original(name: str, work: Path) -> Path:
    """Save a model as a float32 folder, with the field of its config that older transformers reads."""
    folder = work / Path(name).stem
    if not folder.exists():
        model, tokenizer = lp.load(name)
        lp.save(model.float(), tokenizer, folder)
        config = json.loads((folder / "config.json").read_text())
        config["rope_theta"] = model.config.rope_parameters["rope_theta"]
        (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def calibration_sets(folder: Path, args: argparse.Namespace) -> dict[str, Calibration]:
    """Write the calibration tokens that all tools share."""
    tokenizer, sets = AutoTokenizer.from_pretrained(folder), {}
    for name, samples, tokens in (("small", 10, 64), ("large", args.samples, WINDOW_TOKENS)):
        file = args.work / f"{folder.name}-{name}.safetensors"
        save_file({"ids": calibration(str(args.text), tokenizer, samples, tokens)}, file)
        sets[name] = Calibration(text=args.text, samples=samples, tokens=tokens, file=file)
    return sets


def tokens_of(tokens: Calibration) -> str:
    """Describe a calibration set."""
    return f"{tokens.samples} x {tokens.tokens}"


def output_of(row: Row, folder: Path, work: Path, target: float) -> Path:
    """Return the folder of a row's checkpoint."""
    return work / f"{folder.name}-{target}-{row.tool}-{row.method}"


def run_rows(
    rows: list[Row], folder: Path, sets: dict[str, Calibration], args: argparse.Namespace, *, target: float
) -> dict[str, list[dict[str, Any]]]:
    """Run all rows in turns; return the costs of every round, which a file beside the checkpoint keeps."""
    costs: dict[str, list[dict[str, Any]]] = {}
    for number in range(args.rounds):
        for row in rows:
            file = Path(f"{output_of(row, folder, args.work, target)}.json")
            costs[row.name] = json.loads(file.read_text()) if file.exists() else []
            if len(costs[row.name]) <= number:
                costs[row.name].append(run_row(row, folder, sets, args, target=target))
                file.write_text(json.dumps(costs[row.name]))
    return costs


def run_row(
    row: Row, folder: Path, sets: dict[str, Calibration], args: argparse.Namespace, *, target: float
) -> dict[str, Any]:
    """Run a row's command on one thread; return its cost, or the error that ended it."""
    output = output_of(row, folder, args.work, target)
    shutil.rmtree(output, ignore_errors=True)
    words = command(row, folder, sets[row.calibration or "small"], output, target=target)
    source = ["--source", str(args.source)] if row.tool == "LLM-Pruner" else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        subprocess.run(
            [*shlex.split(args.prefix), interpreter(row, args.environments), *words, *source],
            env=environment, capture_output=True, text=True, check=True, timeout=args.timeout,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"did not return in {args.timeout:.0f} s"}
    except subprocess.CalledProcessError as error:
        return {"error": error.stderr.strip().splitlines()[-1]}
    return json.loads((output / "cost.json").read_text())


def summary(costs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median cost of a row's rounds, or its last error."""
    if "error" in costs[-1]:
        return costs[-1]
    medians = {key: round(median(cost[key] for cost in costs), 2) for key in costs[0]}
    return medians | {"rounds": [round(cost["step_seconds"], 2) for cost in costs]}


def quality(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure size and perplexity of a folder."""
    if not (folder / "pruning_plan.json").exists():
        describe_layers(folder)
    model, tokenizer = lp.load(str(folder))
    texts = {file.name: windows(tokenizer, text(str(file)), WINDOW_TOKENS, args.windows) for file in args.evaluation}
    return {
        "parameters": parameter_count(model),
        "perplexity": {name: round(perplexity(model, ids).perplexity, 2) for name, ids in texts.items()},
        "layers_differ": has_per_layer_widths(model.config),
    }


def quality_or_error(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure a folder, or say why nothing loads it."""
    try:
        return quality(folder, args)
    except lp.PrunerError as error:
        return {"error": f"does not load: {str(error).split(': ', 1)[-1]}"}


def describe_layers(folder: Path) -> None:
    """Write the widths of a checkpoint into its config, for each layer where they differ."""
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
        shape = lambda name: tensors.get_slice(f"model.{name}.weight").get_shape()  # noqa: E731
        config = json.loads((folder / "config.json").read_text())
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        layers = []
        while f"model.layers.{len(layers)}.mlp.gate_proj.weight" in names:
            block = f"layers.{len(layers)}"
            layers.append(
                {
                    "num_attention_heads": shape(f"{block}.self_attn.q_proj")[0] // head_dim,
                    "num_key_value_heads": shape(f"{block}.self_attn.k_proj")[0] // head_dim,
                    "intermediate_size": shape(f"{block}.mlp.gate_proj")[0],
                }
            )
        config |= {"hidden_size": shape("embed_tokens")[1], "head_dim": head_dim, **layers[0]}
    if differing := {str(i): layer for i, layer in enumerate(layers) if layer != layers[0]}:
        config |= {"per_layer_config": differing, "allow_global_per_layer_attribute_access": True}
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def write(file: Path, records: list[dict[str, Any]]) -> None:
    """Write the results with their date, machine and versions."""
    machine = f"{platform.machine()}, 1 thread"
    made = {"date": date.today().isoformat(), "machine": machine, "versions": versions(), "environments": REQUIREMENTS}
    file.write_text(json.dumps({"rows": records, **made}, indent=1) + "\n")


def table(records: list[dict[str, Any]]) -> str:
    """Return the Markdown table; a ratio compares CPU seconds with LLM-Pruner's param_first at the same size."""
    texts = list(records[0]["perplexity"])
    sizes = {record["model"]: record["parameters"] for record in records if record["tool"] == "unpruned"}
    references = {(r["model"], r["target"]): r["step_seconds"] for r in records if r.get("row") == REFERENCE}
    header = ["model", "method", "calibration", "parameters", *map(text_name, texts), "CPU s (ratio)", "GiB"]
    rows = [header, ["---"] * len(header)]
    for record in records:
        cells = [record["model"], record.get("row", "unpruned"), record.get("calibration", "")]
        if "error" in record:
            cells += [record["error"], *[""] * (len(texts) + 2)]
        else:
            cells += [f"{record['parameters'] / sizes[record['model']]:.4f}", *record["perplexity"].values()]
            cells += cost_cells(record, references.get((record["model"], record.get("target"))))
        rows.append(cells)
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in rows)


def text_name(file: str) -> str:
    """Name a text in the head of the table."""
    return Path(file).stem.replace("_", " ")


def cost_cells(record: dict[str, Any], reference: float | None) -> list[str]:
    """Return seconds, with their ratio to the reference's, and memory."""
    if "step_seconds" not in record:
        return ["", ""]
    ratio = f" ({record['step_seconds'] / reference:.2f})" if reference else ""
    return [f"{record['step_seconds']:.1f}{ratio}", f"{record['peak_gib']:.2f}"]


if __name__ == "__main__":
    main()

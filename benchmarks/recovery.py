"""Compare methods of recovery in equal time, and the cost of a step with a bare loop of peft and Trainer.

    python benchmarks/recovery.py --pruned FOLDER --data alpaca.json,c4.jsonl --evaluation wikitext2_test.txt \
        --minutes 20 [--methods lora,full,distill] [--output results/recovery.json]

Every method first runs a few steps to see how long one takes, then as many as fit into the minutes, with the learning
rate going down to zero over them. ``--overhead`` compares a LoRA step with the same step of a plain Trainer instead.
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
from transformers import Trainer, TrainingArguments

import llm_pruner as lp
from llm_pruner.data import text
from llm_pruner.evaluation.perplexity import perplexity, windows
from llm_pruner.recovery.arguments import RecoverArguments
from llm_pruner.recovery.run import recover

COMMON: dict[str, Any] = {
    "batch_size": 16,
    "micro_batch_size": 8,
    "cutoff_len": 128,
    "val_set_size": 0,
    "logging_steps": 10,
    "eval_steps": 10_000,
    "save_steps": 10_000,
    "lr_scheduler_type": "cosine",
    "train_on_inputs": True,
    "dtype": "float32",  # the same on every processor; --set chooses another
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "learning_rate": 1e-3, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0},
    "full": {"method": "full", "learning_rate": 2e-4},
    "distill": {"method": "distill", "learning_rate": 2e-4, "distill_weight": 0.5},
    "lora+teacher": {
        **{"method": "lora", "learning_rate": 1e-3, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0},
        "teacher": "auto",
    },
}
PROBE = 4  # steps that tell how long one takes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pruned", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--evaluation", default="python-docs")
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--set", default="{}", help="JSON of flags that all methods are given")
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--keep", type=Path, help="keep the recovered models in this folder")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.overhead:
        results: Any = overhead(args)
    else:
        results = [equal_time(args, name) for name in args.methods.split(",")]
    if args.output:
        machine = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
        )
        args.output.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


def equal_time(args: argparse.Namespace, name: str) -> dict[str, Any]:
    flags = COMMON | METHODS[name] | json.loads(args.set)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep / name if args.keep else Path(scratch) / "run"
        base = {"prune_model": args.pruned, "data_path": args.data, **flags}
        recover(RecoverArguments.of(**base, max_steps=PROBE, output_dir=f"{scratch}/probe"))
        probe = json.loads(Path(f"{scratch}/probe/recovery.json").read_text())
        steps = int(args.minutes * 60 / (probe["seconds"] / PROBE))
        recover(RecoverArguments.of(**base, max_steps=steps, output_dir=str(folder)))
        told = json.loads((folder / "recovery.json").read_text())
        model, tokenizer = lp.load(str(folder))
        ids = windows(tokenizer, text(args.evaluation, "test"), 128, args.windows)
        found = {
            "method": name,
            "flags": flags,
            "steps": steps,
            "seconds": told["seconds"],
            "tokens": told["tokens"],
            "perplexity": round(perplexity(model, ids, 16).perplexity, 2),
        }
    print(json.dumps(found), flush=True)
    return found


def overhead(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a LoRA step, ours over those of peft and Trainer with nothing around, taken in turn."""
    from llm_pruner.recovery.adapters import make_trainable
    from llm_pruner.recovery.datasets import padding_collator
    from llm_pruner.recovery.rows import read_rows
    from llm_pruner.recovery.settings import resolve_settings
    from llm_pruner.recovery.tokenize import ExampleFormat, tokenize

    steps = 8
    ours, theirs = [], []
    flags = COMMON | METHODS["lora"] | {"prune_model": args.pruned, "data_path": args.data, "max_steps": steps}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(3):
            given = RecoverArguments.of(**flags, output_dir=f"{scratch}/ours{turn}")
            recover(given)
            ours.append(json.loads(Path(f"{scratch}/ours{turn}/recovery.json").read_text())["seconds"] / steps)
            model, tokenizer = lp.load(args.pruned)
            form = ExampleFormat(cutoff_len=128, train_on_inputs=True)
            data = tokenize(read_rows(args.data.split(",")[0]), tokenizer, form, args.data)
            settings = TrainingArguments(
                f"{scratch}/theirs{turn}",
                per_device_train_batch_size=COMMON["micro_batch_size"],
                gradient_accumulation_steps=COMMON["batch_size"] // COMMON["micro_batch_size"],
                max_steps=steps,
                learning_rate=1e-3,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            )
            student = make_trainable(model, resolve_settings(given).adapter)
            trainer = Trainer(student, settings, padding_collator(tokenizer, model), data)
            start = time.perf_counter()
            trainer.train()
            theirs.append((time.perf_counter() - start) / steps)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    found = {"ours": ours, "theirs": theirs, "ratio": round(statistics.median(ratios), 3)}
    print(json.dumps(found), flush=True)
    return found


if __name__ == "__main__":
    main()

"""Short recovery runs on tiny models, and readers of the files that they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

import llm_pruner as lp
from helpers.architectures import perturbed, tiny_config
from llm_pruner.recovery.arguments import RecoverArguments

SHORT_RUN = {
    "device": "cpu",
    "dtype": "float32",  # equal numbers on every processor
    "batch_size": 4,
    "micro_batch_size": 2,
    "max_steps": 8,
    "val_set_size": 8,
    "cutoff_len": 96,
    "lora_r": 4,
    "eval_steps": 8,
    "save_steps": 8,
    "logging_steps": 1,
    "learning_rate": 1e-2,
}


def arguments(home: Path, out: Path, **changes: Any) -> RecoverArguments:
    """Return the arguments of a short run that trains the pruned model in ``home``."""
    given = {"prune_model": str(home / "pruned"), "data_path": str(home / "data.jsonl"), "output": str(out)}
    return RecoverArguments.of(**(given | SHORT_RUN | changes))


def write_pruned(name: str, tokenizer: Any, folder: Path, kind: str) -> None:
    """Prune a tiny random model of a type and write it to a folder."""
    config = tiny_config(name)
    config.vocab_size = len(tokenizer)
    model = perturbed(AutoModelForCausalLM, config)
    graph = lp.trace(model)
    plan = lp.select(graph, lp.score(model, graph, criterion="l2"), 0.25, kinds=(kind,), round_to=8)
    lp.save(lp.apply(model, plan), tokenizer, folder, plan=plan)


def read_losses(folder: Path) -> list[tuple[int, float]]:
    """Return the training losses of a run as (step, loss)."""
    return json.loads((Path(folder) / "curves.json").read_text())["loss"]


def read_record(folder: Path) -> dict[str, Any]:
    return json.loads((Path(folder) / "recovery.json").read_text())

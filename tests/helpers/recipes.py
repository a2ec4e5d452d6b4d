"""A small recipe of four stages, written to a folder."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoConfig

FOUR_STAGES = """
model: {home}/base
output: {out}
evaluate: {{datasets: {home}/text.txt, seq_len: 32, max_windows: 4}}
stages:
  - prune:
      name: depth
      num_layers: 2
      depth: loss_change
      num_examples: 8
      calib_seq_len: 16
      compensate: none
  - prune:
      name: width
      target_params: 0.9
      pruner_type: l2
      compensate: none
      hardware_align: false
  - recover:
      data_path: {home}/data.jsonl
      batch_size: 4
      micro_batch_size: 2
      max_steps: 4
      eval_steps: 2
      save_steps: 2
      learning_rate: 1e-3
      warmup_steps: 1
      val_set_size: 4
      lora_r: 2
      cutoff_len: 64
      device: cpu
  - vocab:
      corpus: [{home}/text.txt]
      keep: 400
      eval_dataset: {home}/text.txt
      max_windows: 2
"""
PRUNE = "  - prune: {pruner_type: l2, preset: paper, hardware_align: false}\n"
ADAPTER = """  - recover: {{data_path: {home}/text.txt, no_instruction: true, max_steps: 2, batch_size: 2,
      micro_batch_size: 2, cutoff_len: 16, val_set_size: 0, lora_r: 2, merge: false, device: cpu}}
"""


def write_recipe(folder: Path, home: Path, stages: str, head: str = "") -> Path:
    """Write a recipe of the tiny model that measures its perplexity; ``head`` is more of its entries."""
    text = f"model: {home}/base\noutput: {folder}/out\n{head}stages:\n{stages}"
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def results(folder: Path) -> list[dict]:
    """Return the rows of a run's results, without what differs from run to run."""
    rows = json.loads((folder / "results.json").read_text())
    return [{key: value for key, value in row.items() if key not in ("seconds", "folder")} for row in rows]


def save_config(folder: Path, kind: str, **fields) -> Path:
    AutoConfig.for_model(kind, **fields).save_pretrained(folder)
    return folder


def printed_table(text: str) -> dict[str, list[str]]:
    """Return the cells of a table by its first column; the table may be printed in several parts."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    table: dict[str, list[str]] = {}
    for first, *cells in lines:
        table.setdefault(first, []).extend(cells)
    return table

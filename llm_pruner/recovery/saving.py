"""Write a recovered model, its adapter and its record into the output folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..checkpoint.config import load_config
from ..checkpoint.load import load
from ..checkpoint.locate import PLAN_FILE
from ..checkpoint.save import write_checkpoint
from ..files import MODEL_CONFIGS, complete_folder, strict_json, sync_folder
from ..selection.plan import PruningPlan
from ..surgery.tokenizer import save_tokenizer
from .settings import RecoverySettings

# Without one of these a folder holds no model.
CONFIGS = (*MODEL_CONFIGS, "generation_config.json", "tokenizer_config.json")
TEMPORARY = ".final-"  # prefix of the folder where the result is written first
METRICS_FILE = "recovery.json"


def save_recovered(
    student: Any, tokenizer: PreTrainedTokenizerBase, plan: PruningPlan, *, settings: RecoverySettings, record: Any
) -> None:
    """Write the adapter or model, and with ``merge`` the merged model too, in the dtype of the pruned model.

    The files are written to a temporary folder, then moved into the output folder, which the checkpoints share.

    Args:
        record: content of ``recovery.json``.
    """
    folder = settings.output.folder
    config = load_config(settings.model.name, settings.model.trust_remote_code)
    dtype = config.dtype or torch.float32
    student.config.use_cache = getattr(config, "use_cache", True)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=folder) as name:
        temporary = Path(name)
        if settings.adapter is None:
            write_checkpoint(student.to(dtype), tokenizer, temporary, plan, cut=True)
        else:
            _write_adapter(student, tokenizer, plan, temporary)
        (temporary / METRICS_FILE).write_text(strict_json(record), encoding="utf-8")
        sync_folder(temporary)
        _move_files(temporary, folder)
    if settings.output.merge:
        with complete_folder(folder / "merged", owned_if="config.json") as temporary:
            write_checkpoint(_merge(student, settings).to(dtype), tokenizer, temporary, plan, cut=True)


def _merge(student: Any, settings: RecoverySettings) -> Any:
    """Return the model with the adapter merged into its weights as they are stored."""
    if settings.model.weights is torch.float32:
        return student.merge_and_unload(safe_merge=True)
    # Weights that were narrowed for training have lost digits: merge into those of the checkpoint.
    return load(str(settings.output.folder), torch.float32, "cpu", settings.model.trust_remote_code)[0]


def _write_adapter(student: Any, tokenizer: PreTrainedTokenizerBase, plan: PruningPlan, folder: Path) -> None:
    student.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's, an empty form
    _sort_targets(folder / "adapter_config.json")
    save_tokenizer(tokenizer, folder)
    replace(plan, weights={}).save(folder / PLAN_FILE)  # describes the model under the adapter


def _sort_targets(file: Path) -> None:
    """Sort the lists that peft writes from sets, so that equal runs leave equal files."""
    config = {
        name: sorted(value) if name.startswith("target_") and isinstance(value, list) else value
        for name, value in json.loads(file.read_text(encoding="utf-8")).items()
    }
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _move_files(source: Path, folder: Path) -> None:
    """Replace a folder's model: configs are removed first and moved last, so that no half of a model can be loaded."""
    for name in CONFIGS:
        (folder / name).unlink(missing_ok=True)
    for file in sorted(source.iterdir(), key=lambda file: file.name in CONFIGS):
        if file.is_dir():  # chat templates beside the default one
            shutil.rmtree(folder / file.name, ignore_errors=True)
        else:
            file.chmod(0o644)
        os.replace(file, folder / file.name)

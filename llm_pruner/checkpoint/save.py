"""Saving: a folder is complete or it is not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import PrunerError
from ..selection import PruningPlan
from ..vocabulary.tokenizer import cut_tokenizer
from .card import CARD, upload, write_card
from .shards import sha256
from .standalone import forget_modelling, write_modelling

PLAN_FILE = "pruning_plan.json"
SHARD = "4GB"
# What checkpoints and runs are made of.
OURS = {".json", ".safetensors", ".jinja", ".txt", ".model", ".log", ".scores", ".py"}


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    plan: PruningPlan | None = None,
    standalone: bool = False,
    push_to_hub: str | None = None,
    token: str | None = None,
) -> Path:
    """Write a checkpoint: safetensors, config.json, tokenizer files and ``pruning_plan.json``.

    Everything is written beside ``folder`` and renamed into place. A checkpoint that is there already is
    replaced; a folder that holds anything else is left alone.

    Args:
        standalone: write a modelling file too, so that a checkpoint whose layers differ loads where there is no
            llm_pruner, with ``trust_remote_code=True``.
        push_to_hub: a repository, as ``user/name``, to which the folder goes as well; it is made if it is not there.
        token: access token for the hub.

    Raises:
        PrunerError: the folder cannot be written or holds something else than a checkpoint, or the hub refuses it.
    """
    with complete_folder(folder, owned_if="config.json") as temporary:
        write_checkpoint(model, tokenizer, temporary, plan, standalone)
        if plan is not None:
            write_card(model.config, temporary, plan, Path(folder).name)
    if push_to_hub:
        upload(Path(folder), push_to_hub, token)
    return Path(folder)


def write_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    plan: PruningPlan | None = None,
    standalone: bool = False,
) -> None:
    """Write the files of a checkpoint into a folder that somebody else completes."""
    forget_modelling(model)
    model.save_pretrained(folder, max_shard_size=SHARD)
    if standalone:
        write_modelling(model, folder)
    if tokenizer is not None:
        kept = None if plan is None else plan.tokens
        if kept is not None and len(tokenizer) > len(kept):  # the original's, not yet cut
            cut_tokenizer(tokenizer, kept, folder)
        else:
            tokenizer.save_pretrained(folder)
    if plan is not None:
        weights = {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}
        replace(plan, weights=weights).save(folder / PLAN_FILE)
    for file in folder.iterdir():  # safetensors writes for its owner alone
        file.chmod(0o644)


@contextmanager
def complete_folder(folder: str | Path, owned_if: str) -> Iterator[Path]:
    """A temporary folder that takes the place of ``folder`` when the block succeeds, and vanishes when it fails.

    Args:
        owned_if: an existing non-empty ``folder`` is replaced only if it holds this file, and nothing that is no part
            of a checkpoint or a run.
    """
    target = Path(folder).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise PrunerError(f"{target} is a file; give a folder to write to")
    inside = list(target.iterdir()) if target.is_dir() else []
    foreign = [p.name for p in inside if p.is_dir() or (p.suffix not in OURS and p.name != CARD)]
    if inside and (foreign or not (target / owned_if).exists()):
        reason = f"it holds {min(foreign)}" if foreign else f"it has no {owned_if}"
        raise PrunerError(f"the folder {target} is not ours to replace ({reason}); give another")
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        yield temporary
        sync_folder(temporary)
        _swap(temporary, target)
    except OSError as error:
        raise PrunerError(f"cannot write {target}: {error.strerror or error}") from error
    except Exception as error:
        if "No space left" in str(error) or "Permission denied" in str(error):  # safetensors wraps it
            raise PrunerError(f"cannot write {target}: {error}") from error
        raise
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Force everything in a folder to disk, so that the rename cannot overtake the contents."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(temporary: Path, target: Path) -> None:
    temporary.chmod(0o755)
    if target.exists():
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old)
    else:
        temporary.rename(target)

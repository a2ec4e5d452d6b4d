"""Saving: a folder is complete or it is not there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import complete_folder
from ..selection.plan import PruningPlan
from ..surgery.tokenizer import cut_tokenizer
from .card import upload, write_card
from .locate import PLAN_FILE
from .shards import sha256
from .standalone import forget_modelling, write_modelling

SHARD = "4GB"


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
        tokenizer: the original's or the pruned model's; where the plan cuts the vocabulary, the original's is cut. None
            writes none.
        plan: by which the model was pruned; it says so in ``pruning_plan.json``.
        standalone: write a modelling file too, so that a checkpoint whose layers differ loads where there is no
            llm_pruner, with ``trust_remote_code=True``.
        push_to_hub: a repository, as ``user/name``, to which the folder goes as well; it is made if it is not there.
        token: access token for the hub.

    Raises:
        PrunerError: the folder cannot be written or holds something else than a checkpoint, or the hub refuses it.
    """
    folder = Path(folder).expanduser()
    with complete_folder(folder, owned_if="config.json") as temporary:
        write_checkpoint(model, tokenizer, temporary, plan, standalone)
        if plan is not None:
            write_card(model.config, temporary, plan, folder.name)
    if push_to_hub:
        upload(folder, push_to_hub, token)
    return folder


def write_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    plan: PruningPlan | None = None,
    standalone: bool = False,
    cut: bool = False,
) -> None:
    """Write the files of a checkpoint into a folder that somebody else completes.

    Args:
        cut: the tokenizer is known to be the pruned model's already.
    """
    forget_modelling(model)
    model.save_pretrained(folder, max_shard_size=SHARD)
    if standalone:
        write_modelling(model, folder)
    if tokenizer is not None:
        kept = None if plan is None else plan.tokens
        if kept is not None and not (cut or _is_cut(tokenizer, kept)):
            cut_tokenizer(tokenizer, kept, folder)
        else:
            tokenizer.save_pretrained(folder)
    if plan is not None:
        weights = {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}
        replace(plan, weights=weights).save(folder / PLAN_FILE)
    for file in folder.iterdir():  # safetensors writes for its owner alone
        file.chmod(0o644)


def _is_cut(tokenizer: PreTrainedTokenizerBase, kept: list[int]) -> bool:
    """Whether a tokenizer is the one that a plan left, and not the original's: it comes from such a checkpoint.

    Its length does not tell: many models have more rows than their tokenizers have tokens.
    """
    file = Path(tokenizer.name_or_path) / PLAN_FILE
    if len(tokenizer) > len(kept) or not file.is_file():
        return False
    return PruningPlan.load(file).tokens == kept

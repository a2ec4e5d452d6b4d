"""Save checkpoints atomically: a folder is complete or absent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import PrunerError, in_one_line
from ..files import complete_folder
from ..progress import Step, without_bars
from ..selection.plan import PruningPlan
from ..surgery.tokenizer import cut_tokenizer, save_tokenizer
from .card import upload, write_card
from .companions import companions_of, copy_companions
from .locate import PLAN_FILE
from .shards import sha256
from .standalone import forget_modelling, write_modelling

SHARD = "4GB"
MEGABYTE = 10**6


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    plan: PruningPlan | None = None,
    *,
    standalone: bool = False,
    push_to_hub: str | None = None,
    token: str | None = None,
) -> Path:
    """Write a checkpoint: safetensors, config.json, tokenizer files and ``pruning_plan.json``.

    Everything is written beside ``folder`` and renamed into place. An existing checkpoint is replaced; a folder that
    holds other files is left alone.

    Args:
        model: model to write, with its weights.
        tokenizer: tokenizer of the original or of the pruned model; if the plan cuts the vocabulary, the original's is
            cut. None writes no tokenizer.
        folder: folder to write.
        plan: plan by which the model was pruned, for ``pruning_plan.json`` and the model card.
        standalone: write a modelling file too, so that a checkpoint with per-layer widths loads without llm_pruner,
            with ``trust_remote_code=True``.
        push_to_hub: repository, as ``user/name``, to upload the folder to; it is created if it does not exist.
        token: access token for the hub.

    Returns:
        The folder.

    Raises:
        PrunerError: the folder cannot be written or holds files foreign to a checkpoint, or the hub refuses it.

    Example:
        >>> import tempfile, llm_pruner as lp
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> model = LlamaForCausalLM(config).eval()
        >>> graph = lp.trace(model)
        >>> plan = lp.select(graph, lp.score(model, graph, criterion="l2"), ratio=0.5, kinds=("neurons",))
        >>> folder = lp.save(lp.apply(model, plan), None, f"{tempfile.mkdtemp()}/pruned", plan)
        >>> sorted(file.name for file in folder.glob("*.json"))
        ['config.json', 'generation_config.json', 'pruning_plan.json']
        >>> pruned, tokenizer = lp.load(str(folder))
        >>> pruned.config.intermediate_size, tokenizer is None
        (16, True)
    """
    folder = Path(folder).expanduser()
    with complete_folder(folder, owned_if="config.json") as temporary:
        write_checkpoint(model, tokenizer, temporary, plan, standalone=standalone)
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
    *,
    standalone: bool = False,
    cut: bool = False,
) -> None:
    """Write the files of a checkpoint into a folder that the caller completes.

    Args:
        cut: the tokenizer is the pruned model's already.
    """
    forget_modelling(model)
    megabytes = sum(tensor.nbytes for tensor in model.parameters()) // MEGABYTE
    with without_bars(), Step("writing weights, MB", megabytes, count=lambda: _written_bytes(folder) // MEGABYTE):
        _write_weights(model, folder)
    if standalone:
        write_modelling(model, folder)
    if tokenizer is not None:
        kept = None if plan is None else plan.tokens
        if kept is not None and not (cut or _is_cut(tokenizer, kept)):
            cut_tokenizer(tokenizer, kept, folder)
        else:
            save_tokenizer(tokenizer, folder)
    if source := companions_of(model.config.name_or_path, getattr(model.config, "_commit_hash", None)):
        copy_companions(source, folder, tokenizer=False)
    if plan is not None:
        weights = {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}
        replace(plan, weights=weights).save(folder / PLAN_FILE)
    for file in folder.iterdir():
        if file.is_file():  # safetensors writes for its owner alone
            file.chmod(0o644)


def _write_weights(model: PreTrainedModel, folder: Path) -> None:
    """Write weights and config.

    Raises:
        PrunerError: parameters share their memory without being tied by the model's class.
    """
    try:
        model.save_pretrained(folder, max_shard_size=SHARD)
    except RuntimeError as error:
        if "shared tensors" not in str(error):
            raise
        raise PrunerError(
            "parameters of the model share their memory, and a checkpoint would hold them once: give each its own, "
            f"parameter.data = parameter.data.clone() ({in_one_line(error)})"
        ) from error


def _written_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _is_cut(tokenizer: PreTrainedTokenizerBase, kept: list[int]) -> bool:
    """Return True if a tokenizer comes from a checkpoint of such a plan, and so is cut already.

    Its length does not tell: many models have more rows than their tokenizers have tokens.
    """
    file = Path(tokenizer.name_or_path) / PLAN_FILE
    if len(tokenizer) > len(kept) or not file.is_file():
        return False
    return PruningPlan.load(file).tokens == kept

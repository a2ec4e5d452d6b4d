"""Carrying out a plan on files: every tensor is read, cut and written by itself, and no model is built."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from ..errors import PrunerError
from ..files import complete_folder
from ..models.skeleton import canonical_names
from ..selection.plan import PruningPlan, name_after
from ..surgery.apply import apply
from ..surgery.slicing import cut
from ..surgery.tokenizer import cut_tokenizer
from .card import write_card
from .config import load_config, meta_model
from .load import load_model
from .locate import PLAN_FILE, locate
from .on_disk import on_disk
from .save import write_checkpoint
from .shards import SINGLE, Shards, write_index, write_shard
from .standalone import forget_modelling, write_modelling
from .stored import OtherForm, stored_names

# What a checkpoint has beside weights and config, and goes with it as it is.
COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.jinja"),
)


def apply_to_files(
    plan: PruningPlan, source: str, target: str | Path, trust_remote_code: bool = False, standalone: bool = False
) -> Path:
    """Write the checkpoint that a plan leaves of another, shard by shard; no shard is ever in memory.

    Where the files hold the weights in another form than the model does (every expert by itself, where the model has
    them in one tensor), the weights are mapped from the files and the new ones lie in files too until they are saved.

    Args:
        source: a folder of safetensors.
        target: the new folder; it appears complete or not at all.
        standalone: as in :func:`llm_pruner.save`.

    Raises:
        PrunerError: the plan is for another model, or a tensor is missing or damaged.
    """
    path, gguf = locate(source)
    if gguf is not None or not Path(path).is_dir():
        raise PrunerError(f"{source} is no folder of safetensors: only these are cut file by file")
    plan = replace(plan, settings={"base_model": source, **plan.settings})
    target = Path(target).expanduser()
    with complete_folder(target, owned_if="config.json", reads=source) as folder:
        pruned = cut_files(plan, source, folder, trust_remote_code)
        if standalone:
            write_modelling(pruned, folder)
        write_card(pruned.config, folder, plan, target.name)
    return target


def cut_files(plan: PruningPlan, source: str, folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """Write the files of :func:`apply_to_files` into a folder that somebody else completes.

    Returns the pruned model, on the meta device unless its weights had to be mapped.
    """
    path, _ = locate(source)
    config = load_config(source, trust_remote_code)
    model = meta_model(config, trust_remote_code)
    forget_modelling(model)
    if model.can_generate() and (Path(path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    shards = Shards(path)
    hidden = any(choice.kind == "hidden" for choice in plan.units.values())  # factors of its size show in logits only
    try:
        names = stored_names(model, shards)
    except OtherForm:
        names = {}
    if hidden or not names:
        pruned = apply(load_model(source, trust_remote_code=trust_remote_code), plan, on_disk(folder))
        write_checkpoint(pruned, None, folder, plan)
        _companions(Path(path), folder, plan)
        return pruned
    pruned = apply(model, plan)
    expected = {name: tuple(tensor.shape) for name, tensor in pruned.state_dict().items()}
    canonical = canonical_names(model)
    contents: dict[str, list[str]] = {}
    hashes: dict[str, str] = {}
    total = 0
    for file in shards.files:
        announced: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        origin: dict[str, tuple[str, str]] = {}  # new name -> stored name, name in the plan
        for stored_name, stored in shards.of(file).items():
            name = names.get(stored_name)
            new = None if name is None else name_after(name, plan)
            if name is None or new is None:
                continue
            known = canonical[name]
            shape = plan.cut_shape(known, stored.shape)
            if shape != expected[new]:
                raise PrunerError(
                    f"{stored_name} in {file} is {list(stored.shape)} and would become {list(shape)}; the pruned "
                    f"model has {list(expected[new])}: config and weights do not belong together"
                )
            announced[new], origin[new] = (stored.dtype, shape), (stored_name, known)
        if not announced:  # all of its layers went
            continue
        hashes[file.name] = write_shard(
            folder / file.name,
            announced,
            lambda new: _cut(shards, *origin[new], plan),  # noqa: B023
        )
        contents[file.name] = list(announced)
        total += sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in announced.values())
    if list(contents) != [SINGLE]:
        write_index(folder, contents, total)
    pruned.config.dtype = config.dtype
    pruned.config.save_pretrained(folder)
    if pruned.can_generate():
        pruned.generation_config.save_pretrained(folder)
    _companions(Path(path), folder, plan)
    replace(plan, weights=hashes).save(folder / PLAN_FILE)
    return pruned


def _cut(shards: Shards, stored: str, known: str, plan: PruningPlan) -> torch.Tensor:
    return cut(known, shards.read(stored, again=True), plan)  # which is always a copy


def _companions(source: Path, target: Path, plan: PruningPlan) -> None:
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file() and not file.name.startswith("model") and not (target / file.name).exists():
                shutil.copyfile(file, target / file.name)
    if plan.tokens is not None:
        cut_tokenizer(AutoTokenizer.from_pretrained(source), plan.tokens, target)

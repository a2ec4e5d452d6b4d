"""Carrying out a plan on files: every tensor is read, cut and written by itself, and no model is built."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from ..errors import PrunerError
from ..files import complete_folder
from ..graph import sources
from ..selection import PruningPlan, renamed
from ..surgery import apply
from ..surgery.config_solver import canonical_names, names_of
from ..surgery.slicing import cut
from ..vocabulary.tokenizer import cut_tokenizer
from .card import write_card
from .load import load_config, load_model, locate, meta_model
from .mapped import on_disk
from .save import PLAN_FILE, write_checkpoint
from .shards import SINGLE, Shards, write_index, write_shard
from .standalone import forget_modelling, write_modelling

# What a checkpoint has beside weights and config, and goes with it as it is.
COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.jinja"),
)


class OtherForm(PrunerError):
    """A checkpoint holds its tensors in another form than the model, such as every expert by itself."""


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
            new = None if name is None else renamed(name, plan)
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


def weights_in(source: str, trust_remote_code: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a folder, one after the other, by the names that the model has for them.

    Raises:
        PrunerError: as :class:`Shards` does, and where the files hold them in another form.
    """
    model = meta_model(load_config(source, trust_remote_code), trust_remote_code)
    shards = Shards(locate(source)[0])
    canonical = canonical_names(model)
    for stored, name in stored_names(model, shards).items():
        yield canonical[name], shards.read(stored)


def stored_names(model: PreTrainedModel, shards: Shards) -> dict[str, str]:
    """The model's own name of every tensor of a checkpoint; what the model does not know is left out.

    Raises:
        PrunerError: the checkpoint lacks tensors of the model, or (``OtherForm``) has them in another form.
    """
    own = model.state_dict()
    prefix = model.base_model_prefix
    out = {}
    for stored in shards.tensors:
        for name in (stored, f"{prefix}.{stored}", stored.removeprefix(f"{prefix}.")):
            if name in own:
                out[stored] = name
                break
    tied = names_of(model)
    found = set(out.values())
    missing = [name for name in sources(model) if name in own and not found & set(tied[name])]
    if missing:
        strange = [name for name in shards.tensors if name not in out]
        if strange:
            raise OtherForm(
                f"{shards.folder} stores {strange[0]} and not {missing[0]}, as {type(model).__name__} has it"
            )
        raise PrunerError(f"{shards.folder} lacks {missing[0]} of {type(model).__name__}: the checkpoint is incomplete")
    return out


def _cut(shards: Shards, stored: str, known: str, plan: PruningPlan) -> torch.Tensor:
    return cut(known, shards.read(stored, again=True), plan)  # which is always a copy


def _companions(source: Path, target: Path, plan: PruningPlan) -> None:
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file() and not file.name.startswith("model") and not (target / file.name).exists():
                shutil.copyfile(file, target / file.name)
    if plan.tokens is not None:
        cut_tokenizer(AutoTokenizer.from_pretrained(source), plan.tokens, target)

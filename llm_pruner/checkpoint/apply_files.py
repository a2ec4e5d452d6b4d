"""Apply a plan to files: every tensor is read, cut and written by itself, and no model is built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from ..errors import PrunerError
from ..files import complete_folder, write_text
from ..graph.tracer import TraceError
from ..logs import log
from ..models.skeleton import canonical_names
from ..progress import Step
from ..selection.plan import PruningPlan, name_after
from ..surgery.apply import apply
from ..surgery.slicing import cut
from ..surgery.tokenizer import cut_tokenizer
from .card import write_card
from .companions import copy_companions
from .config import load_config
from .load import load_model
from .locate import PLAN_FILE, locate
from .on_disk import on_disk
from .save import write_checkpoint
from .shards import SINGLE, Shards, ShardWriter, TensorType, write_index
from .standalone import forget_modelling, write_modelling
from .stored import OtherForm, model_of, stored_names
from .unread import UNREAD, check_unquantized, forget_unread, unread_tensors

APPLY_FILE = "apply.json"  # record of llm-pruner apply


def apply_to_files(
    plan: PruningPlan,
    source: str,
    target: str | Path,
    trust_remote_code: bool = False,
    *,
    standalone: bool = False,
    task: str | None = None,
    record: str = "",
) -> Path:
    """Apply a plan to the files of a checkpoint, tensor by tensor; no shard is ever in memory as a whole.

    If the files store weights in another form than the model (one tensor per expert instead of one for all), the
    weights stay memory-mapped, and the new ones are memory-mapped too until they are saved.

    A refit by the run that made the plan is not repeated; the log, the new plan and the model card say so.

    Args:
        source: folder of safetensors.
        target: new folder; it appears complete or not at all.
        standalone: as in :func:`llm_pruner.save`.
        task: class that the plan was made for, as in :func:`llm_pruner.load`.
        record: content of ``apply.json``, which tells a later run who wrote the folder; "": no such file.

    Raises:
        PrunerError: the plan is for another model, or a tensor is missing or damaged.
    """
    path, gguf = locate(source)
    if gguf is not None or not Path(path).is_dir():
        raise PrunerError(f"{source} is not a folder of safetensors files, which apply needs: give one")
    plan = replace(plan, settings={"base_model": source, **plan.settings})
    if "refit" in plan.settings:
        plan.settings["without_refit"] = True
        log.warning("the plan's run was refitted on calibration data and this checkpoint is not: --refit does it again")
    target = Path(target).expanduser()
    with complete_folder(target, owned_if="config.json", reads=source) as folder:
        pruned = cut_files(plan, source, folder, trust_remote_code, task=task)
        if standalone:
            write_modelling(pruned, folder)
        write_card(pruned.config, folder, plan, target.name)
        if record:
            write_text(folder / APPLY_FILE, record)
    return target


def cut_files(
    plan: PruningPlan, source: str, folder: Path, trust_remote_code: bool = False, *, task: str | None = None
) -> PreTrainedModel:
    """Write the files of :func:`apply_to_files` into a folder that the caller completes.

    Returns:
        The pruned model, on the meta device unless its weights had to be mapped.
    """
    path = Path(locate(source)[0])
    config = load_config(source, trust_remote_code, task=task)
    shards = check_unquantized(source, path, config) or Shards(path)
    model = model_of(source, config, shards, trust_remote_code=trust_remote_code)
    forget_modelling(model)
    if model.can_generate() and (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    try:
        names = stored_names(model, shards)
    except OtherForm:
        names = {}
    hidden = any(choice.kind == "hidden" for choice in plan.units.values())  # factors of its size show in logits only
    pruned = None if hidden or not names else _pruned_shapes(model, plan)
    if pruned is None:
        loaded = load_model(source, trust_remote_code=trust_remote_code, task=task)
        if left_out := unread_tensors(loaded):
            plan.settings[UNREAD] = left_out
        pruned = apply(loaded, plan, on_disk(folder))
        write_checkpoint(pruned, None, folder, plan)
    else:
        if left_out := forget_unread(pruned.config, source, shards.tensors.keys() - names.keys()):
            plan.settings[UNREAD] = left_out
        plan = replace(plan, weights=_cut_shards(plan, shards, names, model, pruned, folder))
        pruned.config.dtype = config.dtype
        pruned.config.save_pretrained(folder)
        if pruned.can_generate():
            pruned.generation_config.save_pretrained(folder)
        plan.save(folder / PLAN_FILE)
    copy_companions(path, folder)
    if plan.tokens is not None:
        cut_tokenizer(AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code), plan.tokens, folder)
    return pruned


def _pruned_shapes(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel | None:
    """Apply a plan to a model on the meta device; return None for a model that is traced on its weights only."""
    try:
        return apply(model, plan)
    except TraceError:
        return None


def _cut_shards(
    plan: PruningPlan,
    shards: Shards,
    names: dict[str, str],
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    folder: Path,
) -> dict[str, str]:
    """Cut and write file by file, with an index; return the SHA-256 of every new file.

    Args:
        names: the model's name of every stored tensor.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in pruned.state_dict().items()}
    canonical = canonical_names(model)
    contents: dict[str, list[str]] = {}
    hashes: dict[str, str] = {}
    size = 0
    with Step("cutting tensors", len(shards.tensors)) as step:
        for file in shards.files:
            types: dict[str, TensorType] = {}  # by new name, as stored
            origins: dict[str, str] = {}
            for stored in shards.of(file):
                new = name_after(names[stored], plan) if stored in names else None
                if new is not None:
                    types[new] = _type_after(plan, shards, stored, canonical[names[stored]], shapes[new])
                    origins[new] = stored
            if not types:  # all of its layers went
                continue
            with ShardWriter(folder / file.name, types) as writer:
                for new, stored in origins.items():
                    writer.save_tensor(new, cut(canonical[names[stored]], shards.read(stored, again=True), plan))
                    step.advance()
            hashes[file.name], contents[file.name] = writer.sha256, list(types)
            size += sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in types.values())
    if list(contents) != [SINGLE]:
        write_index(folder, contents, size)
    return hashes


def _type_after(plan: PruningPlan, shards: Shards, stored: str, name: str, expected: tuple[int, ...]) -> TensorType:
    """Return dtype and shape of a stored tensor after the plan, which knows it as ``name``."""
    tensor = shards.tensors[stored]
    shape = plan.cut_shape(name, tensor.shape)
    if shape != expected:
        raise PrunerError(
            f"{stored} in {tensor.file} is {list(tensor.shape)} and would become {list(shape)}; the pruned model has "
            f"{list(expected)}: config and weights do not belong together"
        )
    return tensor.dtype, shape

"""Apply a plan to files: every tensor is read, cut and written by itself, and no model is built."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..errors import PrunerError
from ..files import complete_folder, write_text
from ..graph.tracer import TraceError
from ..logs import log
from ..selection.plan import PruningPlan
from ..surgery.apply import apply
from ..surgery.tokenizer import cut_tokenizer
from .blocks import check_dequantize
from .boxes import OtherForm
from .card import write_card
from .companions import copy_companions
from .config import load_config
from .cut_shards import CutCheckpoint, write_cuts
from .load import load_model, load_tokenizer
from .locate import PLAN_FILE, is_adapter, locate
from .on_disk import on_disk
from .quantized.config import quantization_after
from .quantized.registry import QuantizedShards, open_shards
from .quantized.weights import InsideBlock
from .save import write_checkpoint
from .shards import Shards
from .standalone import forget_modelling, write_modelling
from .stored import dtype_of, model_of, stored_boxes
from .unread import UNREAD, forget_unread, unread_tensors

APPLY_FILE = "apply.json"  # record of llm-pruner apply
WAY_OUT = "remove whole experts, layers or tokens, or add --dequantize, which writes 16 bits"


def apply_to_files(
    plan: PruningPlan,
    source: str,
    target: str | Path,
    trust_remote_code: bool = False,
    *,
    standalone: bool = False,
    task: str | None = None,
    record: str = "",
    dequantize: bool = False,
) -> Path:
    """Apply a plan to the files of a checkpoint, tensor by tensor; no shard is ever in memory as a whole.

    Quantized weights are sliced with their scales, without changing a value. If the files store weights in a form that
    cannot be placed within the model's tensors, the weights stay memory-mapped, and the new ones are memory-mapped too
    until they are saved.

    A refit by the run that made the plan is not repeated; the log, the new plan and the model card say so.

    Args:
        source: folder of safetensors.
        target: new folder; it appears complete or not at all.
        standalone: as in :func:`llm_pruner.save`.
        task: class that the plan was made for, as in :func:`llm_pruner.load`.
        record: content of ``apply.json``, which tells a later run who wrote the folder; "": no such file.
        dequantize: write quantized weights in 16 bits.

    Raises:
        PrunerError: the plan is for another model, it cuts quantized weights inside the blocks of their scales, or a
            tensor is missing or damaged.
    """
    path, gguf = locate(source)
    if gguf is not None or not Path(path).is_dir():
        raise PrunerError(f"{source} is not a folder of safetensors files, which apply needs: give one")
    if is_adapter(path):
        raise PrunerError(f"{source} is an adapter, and apply cuts the files of a model: save it merged first")
    plan = replace(plan, settings={"base_model": source, **plan.settings})
    if "refit" in plan.settings:
        plan.settings["without_refit"] = True
        log.warning("the plan's run was refitted on calibration data and this checkpoint is not: --refit does it again")
    target = Path(target).expanduser()
    with complete_folder(target, owned_if="config.json", reads=source) as folder:
        pruned = cut_files(plan, source, folder, trust_remote_code, task=task, dequantize=dequantize)
        if standalone:
            write_modelling(pruned, folder)
        write_card(pruned.config, folder, plan, target.name)
        if record:
            write_text(folder / APPLY_FILE, record)
    return target


def cut_files(
    plan: PruningPlan,
    source: str,
    folder: Path,
    trust_remote_code: bool = False,
    *,
    task: str | None = None,
    dequantize: bool = False,
    pruned: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """Write the files of :func:`apply_to_files` into a folder that the caller completes.

    Args:
        pruned: the model that the plan leaves, if there is one already.

    Returns:
        The pruned model, on the meta device unless its weights had to be mapped.
    """
    path = Path(locate(source)[0])
    config = load_config(source, trust_remote_code, task=task)
    shards = open_shards(source, path) or Shards(path)
    check_dequantize(source, dequantize)
    model = model_of(source, config, shards, trust_remote_code=trust_remote_code)
    forget_modelling(model)
    if model.can_generate() and (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    quantized = isinstance(shards, QuantizedShards)
    try:
        boxes = stored_boxes(model, shards)
    except OtherForm as error:
        if quantized and not dequantize:
            raise PrunerError(f"{source}: {error}: {WAY_OUT}") from error
        boxes = {}
    hidden = any(choice.kind == "hidden" for choice in plan.units.values())  # factors of its size show in logits only
    given = pruned is not None
    if pruned is None and boxes and not hidden:
        pruned = _pruned_shapes(model, plan)
    loaded = None
    if pruned is None:
        loaded = load_model(source, trust_remote_code=trust_remote_code, task=task, offload_folder=folder)
        if left_out := unread_tensors(loaded):
            plan.settings[UNREAD] = left_out
        pruned = apply(loaded, plan, on_disk(folder))
    if loaded is not None and not (quantized and boxes):
        write_checkpoint(pruned, None, folder, plan)
    else:
        checkpoint = CutCheckpoint(
            plan=plan,
            shards=shards,
            boxes=boxes,
            model=model,
            pruned=pruned,
            dequantized=dtype_of(config) if dequantize else None,
        )
        if not given and loaded is None:
            unread = shards.shapes().keys() - boxes.keys()
            if left_out := forget_unread(pruned.config, source, unread):
                plan.settings[UNREAD] = left_out
        _write(checkpoint, config, source, folder)
    copy_companions(path, folder)
    if plan.tokens is not None:
        tokenizer = load_tokenizer(str(path), trust_remote_code)
        if tokenizer is not None:
            cut_tokenizer(tokenizer, plan.tokens, folder)
    return pruned


def _write(checkpoint: CutCheckpoint, config: PreTrainedConfig, source: str, folder: Path) -> None:
    """Write the cut files, the plan with their hashes, and the configs of the pruned model.

    Raises:
        PrunerError: the plan cuts inside the blocks of quantized weights, or a tensor is damaged.
    """
    pruned = checkpoint.pruned
    try:
        hashes = write_cuts(checkpoint, folder)
    except InsideBlock as error:
        raise PrunerError(f"{source}: {error}: {WAY_OUT}") from error
    written = copy.deepcopy(pruned.config)
    written.dtype = config.dtype if checkpoint.dequantized is None else checkpoint.dequantized
    if isinstance(checkpoint.shards, QuantizedShards) and checkpoint.dequantized is None:
        written.quantization_config = quantization_after(checkpoint.shards.quantization, checkpoint.renamed())
    written.save_pretrained(folder)
    if pruned.can_generate():
        pruned.generation_config.save_pretrained(folder)
    replace(checkpoint.plan, weights=hashes).save(folder / PLAN_FILE)


def _pruned_shapes(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel | None:
    """Apply a plan to a model on the meta device; return None for a model that is traced on its weights only."""
    try:
        return apply(model, plan)
    except TraceError:
        return None

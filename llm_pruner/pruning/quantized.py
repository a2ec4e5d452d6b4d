"""Prune a quantized checkpoint: no refit changes its weights, and indices that share scales go together."""

from __future__ import annotations

from dataclasses import replace
from math import lcm
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.apply_files import WAY_OUT
from ..checkpoint.blocks import Blocks, check_dequantize, is_quantized, stored_blocks
from ..checkpoint.write_pruned import write_pruned
from ..errors import PrunerError
from ..graph.units import CouplingGraph, Unit
from ..logs import log
from ..selection.plan import PruningPlan, name_after
from .refit_settings import RefitSettings
from .settings import PruneSettings

INSIDE = "its indices share numbers of quantized weights with others"


def stays_quantized(settings: PruneSettings) -> bool:
    """Return True if a run slices the files of a quantized checkpoint, so that no weight may change its value."""
    return not settings.output.dequantize and is_quantized(settings.model.name)


def without_refit(settings: PruneSettings) -> PruneSettings:
    """Return settings without the refit of a preset, which would change weights that stay quantized.

    Raises:
        PrunerError: the user asked for a refit.
    """
    refit = settings.refit
    if not stays_quantized(settings) or not (refit.needs_text or refit.rescale_norms):
        return settings
    asked = {"--rescale_norms": refit.rescale_norms, "--refit": refit.required}
    if flag := next((flag for flag, given in asked.items() if given), None):
        raise PrunerError(
            f"{flag} changes weights, and {settings.model.name} stays quantized: leave it out, or add --dequantize, "
            "which writes 16 bits"
        )
    log.info("no refit: %s stays quantized; --dequantize refits it and writes 16 bits", settings.model.name)
    return replace(settings, refit=RefitSettings())


def check_quantized(settings: PruneSettings) -> None:
    """Refuse flags that a quantized model, or one that is not, cannot follow.

    Raises:
        PrunerError: as :func:`without_refit`, and for ``--dequantize`` without effect.
    """
    check_dequantize(settings.model.name, settings.output.dequantize)
    without_refit(settings)


def blocks_for(settings: PruneSettings) -> Blocks:
    """Return the positions that a run must keep or remove together."""
    if not stays_quantized(settings):
        return {}
    return stored_blocks(settings.model.name, settings.model.trust_remote_code, task=settings.model.task)


def save_pruned(
    settings: PruneSettings,
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    plan: PruningPlan,
) -> None:
    """Write the checkpoint of a run, as :func:`llm_pruner.checkpoint.write_pruned.write_pruned` does."""
    write_pruned(
        pruned,
        tokenizer,
        folder,
        plan,
        source=settings.model.name,
        dequantize=settings.output.dequantize,
        standalone=settings.output.standalone,
        trust_remote_code=settings.model.trust_remote_code,
        task=settings.model.task,
    )


def blocks_after(blocks: Blocks, plan: PruningPlan) -> Blocks:
    """Return the blocks of a model that has lost layers, by its own names."""
    return {new: spans for name, spans in blocks.items() if (new := name_after(name, plan)) is not None}


def in_blocks(graph: CouplingGraph, blocks: Blocks, kinds: tuple[str, ...] = ()) -> CouplingGraph:
    """Return a graph whose units lose whole blocks only.

    Units whose blocks differ in size, or are the whole unit, are frozen.

    Args:
        kinds: kinds that must be left, since the user asked for them.

    Raises:
        PrunerError: no unit of such a kind is left.
    """
    if not blocks:
        return graph
    graph = graph.copy()
    for unit in list(graph.units):
        size = block_size(unit, blocks)
        if size is None:
            graph.freeze(unit, INSIDE)
        elif size > 1:
            unit.block, unit.multiple = size, lcm(unit.multiple, size)
            unit.minimum = -(-unit.minimum // size) * size
    for kind in kinds:
        if not graph.of_kind(kind) and any(unit.kind == kind and unit.frozen == INSIDE for unit in graph.frozen):
            raise PrunerError(f"--kinds {kind}: {INSIDE}: {WAY_OUT}")
    return graph


def log_blocks(graph: CouplingGraph, kinds: tuple[str, ...]) -> None:
    """Log the blocks in which units of some kinds go, as ``--round_to`` would make them."""
    for kind in kinds:
        if sizes := sorted({unit.block for unit in graph.of_kind(kind)} - {1}):
            log.info(
                "quantized weights: %s keep multiples of %s indices, since these share scales; --dequantize keeps any "
                "number and writes 16 bits",
                kind,
                " or ".join(map(str, sizes)),
            )


def block_size(unit: Unit, blocks: Blocks) -> int | None:
    """Return how many consecutive indices of a unit must go together, None if such blocks differ or are all of it.

    >>> neurons = Unit("mlp.neurons", "neurons", 0, 8, dims={("down.weight", 1): torch.arange(8)})
    >>> block_size(neurons, {"down.weight": {1: {(0, 8, 4)}}}), block_size(neurons, {})
    (4, 1)
    """
    joined = torch.zeros(unit.size, dtype=torch.long)  # how many blocks hold both an index and the next
    for (name, dim), label in unit.dims.items():
        for start, stop, size in blocks.get(name, {}).get(dim, ()):
            labels = label[start:stop]
            pad = -len(labels) % size
            rows = torch.nn.functional.pad(labels, (0, pad), value=-1).view(-1, size)
            last = rows.amax(1)
            first = torch.where(rows < 0, unit.size, rows).amin(1)
            touched = last >= 0
            if bool((rows < 0)[touched].any()) and bool((labels < 0).any()):
                return None  # a block of this unit's indices and of others'
            joined.index_add_(0, first[touched], torch.ones_like(first[touched]))
            joined.index_add_(0, last[touched], -torch.ones_like(last[touched]))
    ends = (joined.cumsum(0) == 0).nonzero().flatten()
    lengths = ends.diff(prepend=torch.tensor([-1])).unique()
    if len(lengths) != 1 or (lengths[0] > 1 and lengths[0] == unit.size):
        return None
    return int(lengths[0])

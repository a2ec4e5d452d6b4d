"""Trace the towers that ``--towers`` names of a model that reads images or sounds beside text."""

from __future__ import annotations

from collections.abc import Collection

from transformers import PreTrainedModel

from ..errors import PrunerError
from ..graph.units import CouplingGraph, trace
from ..media import check_can_be_shown, trace_media
from ..models.inputs import ModelInputs, reads_text_only
from ..models.layers import is_below
from ..models.towers import tower_paths

LANGUAGE, ALL = "language", "all"


def check_towers(model: PreTrainedModel, towers: str) -> None:
    """Refuse towers that a model does not have, or that nothing can be shown to.

    Raises:
        PrunerError: as above.
    """
    if towers == LANGUAGE:
        return
    paths = tower_paths(model)
    if not paths:
        raise PrunerError(
            f"--towers {towers}: {type(model).__name__} has no towers beside a language model: leave it out, all of "
            "the model is pruned"
        )
    if towers != ALL and towers not in paths:
        raise PrunerError(f"--towers {towers}: {type(model).__name__} has {' and '.join((LANGUAGE, *paths))}")
    check_can_be_shown(model)


def trace_towers(
    model: PreTrainedModel, towers: str, inputs: ModelInputs | None = None, kinds: Collection[str] = ()
) -> CouplingGraph:
    """Trace a model, with images or sounds where others than its language are pruned; freeze the other towers.

    Images or sounds are written to the hidden channels of the language by a projector, so that ``kinds`` with
    ``hidden`` needs them too, and so does a model that reads no text without them.

    Args:
        towers: ``language``, ``vision``, ``audio`` or ``all``.
        inputs: images or sounds with their texts (default: noise).
        kinds: kinds of units that are to be pruned.

    Raises:
        PrunerError: the model has no such tower, or nothing can be shown to it.
    """
    if towers == LANGUAGE and not (tower_paths(model) and ("hidden" in kinds or not reads_text_only(model))):
        return trace(model)
    check_towers(model, towers)
    return freeze_others(trace_media(model, inputs), model, towers)


def freeze_others(graph: CouplingGraph, model: PreTrainedModel, towers: str) -> CouplingGraph:
    """Freeze the units outside the tower that is pruned; return the graph.

    The projector belongs to the language, but for its input: that is the width of the other tower.
    """
    paths = tower_paths(model) if towers != ALL else {}
    for unit in list(graph.units) if paths else ():
        reached = {tower for tower, path in paths.items() if any(is_below(path, name) for name in unit.parameters)}
        if towers not in (reached or {LANGUAGE}):
            graph.freeze(unit, f"--towers {towers} leaves it")
    return graph

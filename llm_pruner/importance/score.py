"""One door to every criterion."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..errors import PrunerError
from ..graph.units import KINDS, CouplingGraph, Unit
from ..models.blockwise import native_compute
from ..models.running import check_calibration, stored_tensors
from .aggregate import AGGREGATIONS, aggregate, slices_of
from .criteria import CRITERIA, Request
from .layers import BY_POSITION, STRATEGIES, score_layers
from .scores import Scores, load_salience, save_salience
from .taylor import VARIANTS


def score(
    model: PreTrainedModel,
    graph: CouplingGraph,
    calibration: torch.Tensor | None = None,
    criterion: str = "taylor",
    *,
    taylor: str = "param_first",
    aggregation: str = "sum",
    kinds: Iterable[str] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    weights: Iterable[tuple[str, torch.Tensor]] | None = None,
    most: int | None = None,
    cache: Path | None = None,
) -> Scores:
    """Score every index of every unit of the graph; higher is worth more.

    Args:
        model: the model that ``graph`` was traced from, with real weights. It is not changed.
        calibration: LongTensor ``[samples, tokens]`` of token ids; ``random``, ``l1`` and ``l2`` do without.
        criterion: ``random``, ``l1``, ``l2``, ``taylor`` (:mod:`llm_pruner.importance.taylor`), or one that needs
            forward passes only: ``activation``, ``wanda`` or ``flap`` (:mod:`llm_pruner.importance.activation`), or,
            for layers alone, one of :data:`llm_pruner.importance.STRATEGIES` (:mod:`llm_pruner.importance.depth`).
        taylor: ``vectorize``, ``param_first``, ``param_second`` or ``param_mix``; see
            :mod:`llm_pruner.importance.taylor`.
        aggregation: over the slices of a group: ``sum``, ``mean``, ``max``, ``prod``, ``first`` or ``last``.
        kinds: score only units of these kinds (None: all). Fewer kinds need fewer gradients.
        seed: of the ``random`` criterion.
        device: where to compute, if not where the weights are: these are then brought there block by block. 16-bit
            weights on the CPU are always computed with in float32, block by block.
        weights: for ``l1`` and ``l2``: weights by name to read one after the other instead of the model's, which may
            then be on the meta device (:func:`llm_pruner.checkpoint.weights_in` reads them from files).
        most: how many layers of a stack will go at most; the criterion ``loss`` measures no further.
        cache: file of what scoring found before it was aggregated: read if it is there, else written. It is for the
            caller to give another file for another model, calibration set or criterion.

    Raises:
        PrunerError: an unknown name, an unusable calibration set, or a gradient that is not finite.
    """
    for value, allowed, what in (
        (criterion, [*CRITERIA, *STRATEGIES], "criterion"),
        (taylor, VARIANTS, "taylor variant"),
        (aggregation, AGGREGATIONS, "aggregation"),
    ):
        if value not in allowed:
            raise PrunerError(f"unknown {what} {value!r}; choose from {', '.join(allowed)}")
    if kinds is not None:
        kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    for kind in kinds or ():
        if kind not in KINDS:
            raise PrunerError(f"unknown kind {kind!r}; choose from {', '.join(KINDS)}")
    _check_graph(model, graph)
    if weights is None and criterion not in (*BY_POSITION, "random") and any(p.is_meta for p in model.parameters()):
        raise PrunerError(f"{criterion} needs weights, and this model has none: load it with llm_pruner.load")
    units: list[Unit] = graph.units if kinds is None else graph.of_kind(*kinds)
    settings = {"criterion": criterion, "aggregation": aggregation, "seed": seed}
    how = native_compute(model) if device is None else native_compute(model).on(torch.device(device))
    if criterion in STRATEGIES:
        kinds = ["layers"] if kinds is None else list(kinds)
        if kinds != ["layers"]:
            raise PrunerError(f"{criterion} scores layers only: give kinds=['layers'], or another criterion")
        ids = None if criterion in BY_POSITION else check_calibration(model, calibration)
        stacks = graph.of_kind("layers")
        return Scores({u.name: score_layers(model, u, criterion, ids, how, most) for u in stacks}, settings)
    entry = CRITERIA[criterion]
    if entry.function is None:
        generator = torch.Generator().manual_seed(seed)
        values = {u.name: torch.rand(u.size, generator=generator, dtype=torch.float64) for u in units}
        return Scores(values, settings)
    if criterion == "taylor":
        settings["taylor"] = taylor
    ranks = {name: parameter.ndim for name, parameter in model.named_parameters()}
    salience = load_salience(cache) if cache else None
    if salience is None:
        request = Request(
            model=model,
            slices=slices_of(units, ranks),
            calibration=calibration,
            taylor=taylor,
            compute=how,
            weights=weights or stored_tensors(model).items(),
        )
        salience = entry.function(request)
        if cache:
            save_salience(salience, cache)
    if entry.reads_only:  # whole layers, and experts, are not read by any weight
        unread = [u for u in units if not any(key in salience for key in u.dims)]
        if unread and (kinds is not None or len(unread) == len(units)):
            raise PrunerError(f"{criterion} says nothing of {unread[0].name}: no weight reads it; use taylor")
        units = [u for u in units if u not in unread]
    values = {unit.name: aggregate(unit, salience, ranks, aggregation) for unit in units}
    for name, scored in values.items():
        if not torch.isfinite(scored).all():
            raise PrunerError(
                f"the scores of {name} are not finite: the weights hold NaN or inf, or --dtype is too narrow"
            )
    return Scores(values, settings)


def _check_graph(model: PreTrainedModel, graph: CouplingGraph) -> None:
    held = stored_tensors(model)
    for name, shape in graph.shapes.items():
        there = tuple(held[name].shape) if name in held else "absent"
        if there != tuple(shape):
            raise PrunerError(f"the graph is of another model: {name} is {list(shape)} in it, here {there}")

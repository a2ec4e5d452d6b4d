"""One door to every criterion."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel

from ..errors import PrunerError
from ..graph import KINDS, Compute, CouplingGraph, Unit, context_length, native, sources
from .activation import activation
from .aggregate import AGGREGATIONS, Salience, Scores, aggregate, load_salience, save_salience, slices_of
from .depth import BY_POSITION, STRATEGIES, depth
from .magnitude import magnitude
from .taylor import VARIANTS, taylor


@dataclass
class Request:
    """What a criterion is asked for: the dims of each parameter to give a number per channel."""

    model: PreTrainedModel
    slices: dict[str, list[int]]
    calibration: torch.Tensor | None
    taylor: str
    compute: Compute
    weights: Iterable[tuple[str, torch.Tensor]]

    @property
    def tokens(self) -> torch.Tensor:
        return calibration_of(self.model, self.calibration)


# A criterion returns numbers per channel; ``random`` needs none.
CRITERIA: dict[str, Callable[[Request], Salience] | None] = {
    "random": None,
    "l1": lambda r: magnitude(r.weights, r.slices, power=1),
    "l2": lambda r: magnitude(r.weights, r.slices, power=2),
    "taylor": lambda r: taylor(r.model, r.slices, r.tokens, r.taylor, r.compute),
    "activation": lambda r: activation(r.model, r.slices, r.tokens, "activation", r.compute),
    "wanda": lambda r: activation(r.model, r.slices, r.tokens, "wanda", r.compute),
    "flap": lambda r: activation(r.model, r.slices, r.tokens, "flap", r.compute),
}
READING = ("activation", "wanda", "flap")  # know only the slices that read a unit
NEED_CALIBRATION = ("taylor", *READING, *(name for name in STRATEGIES if name not in BY_POSITION))


def score(
    model: PreTrainedModel,
    graph: CouplingGraph,
    calibration: torch.Tensor | None = None,
    criterion: str = "taylor",
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
    how = native(model) if device is None else native(model).on(torch.device(device))
    if criterion in STRATEGIES:
        kinds = ["layers"] if kinds is None else list(kinds)
        if kinds != ["layers"]:
            raise PrunerError(f"{criterion} scores layers only: give kinds=['layers'], or another criterion")
        ids = None if criterion in BY_POSITION else calibration_of(model, calibration)
        stacks = graph.of_kind("layers")
        return Scores({u.name: depth(model, u, criterion, ids, how, most) for u in stacks}, settings)
    compute = CRITERIA[criterion]
    if compute is None:
        generator = torch.Generator().manual_seed(seed)
        values = {u.name: torch.rand(u.size, generator=generator, dtype=torch.float64) for u in units}
        return Scores(values, settings)
    if criterion == "taylor":
        settings["taylor"] = taylor
    ranks = {name: parameter.ndim for name, parameter in model.named_parameters()}
    salience = load_salience(cache) if cache else None
    if salience is None:
        request = Request(model, slices_of(units, ranks), calibration, taylor, how, weights or sources(model).items())
        salience = compute(request)
        if cache:
            save_salience(salience, cache)
    if criterion in READING:  # whole layers, and experts, are not read by any weight
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
    held = sources(model)
    for name, shape in graph.shapes.items():
        there = tuple(held[name].shape) if name in held else "absent"
        if there != tuple(shape):
            raise PrunerError(f"the graph is of another model: {name} is {list(shape)} in it, here {there}")


def calibration_of(model: PreTrainedModel, calibration: torch.Tensor | None) -> torch.Tensor:
    """The calibration set, if it is one that the model can read.

    Raises:
        PrunerError: it is none, or has token ids or a length that the model cannot read.
    """
    if calibration is None:
        raise PrunerError("this criterion needs a calibration set: a LongTensor [samples, tokens]")
    if not isinstance(calibration, torch.Tensor):
        raise PrunerError(f"calibration must be a LongTensor of token ids, not {type(calibration).__name__}")
    if calibration.ndim != 2 or calibration.is_floating_point() or calibration.shape[0] < 1 or calibration.shape[1] < 2:
        raise PrunerError(
            f"calibration must be a LongTensor [samples >= 1, tokens >= 2], not {calibration.dtype} "
            f"{list(calibration.shape)}"
        )
    if model.config.is_encoder_decoder and calibration.shape[1] < 3:
        raise PrunerError("an encoder-decoder predicts one half of a sample from the other: give 3 tokens or more")
    weight = cast(torch.Tensor, model.get_input_embeddings().weight)
    if int(calibration.max()) >= weight.shape[0] or int(calibration.min()) < 0:
        raise PrunerError(
            f"calibration has token id {int(calibration.max())}, the model a vocabulary of {weight.shape[0]}: "
            "it was made with another tokenizer"
        )
    longest = context_length(model)
    if longest is not None and calibration.shape[1] > longest:
        raise PrunerError(f"calibration samples have {calibration.shape[1]} tokens, the model reads at most {longest}")
    return calibration

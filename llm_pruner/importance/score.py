"""Score units: one entry point to every criterion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from ..errors import PrunerError
from ..graph.units import KINDS, CouplingGraph, Unit
from ..logs import log
from ..models.blockwise import Compute, native_compute
from ..models.processes import count, from_first
from ..models.running import check_calibration, stored_tensors
from ..unfinished import NOTHING_KEPT, Unfinished
from .aggregate import AGGREGATIONS, dims_to_score
from .criteria import Entry, resolve_criterion
from .layers import BY_POSITION, STRATEGIES, score_layers
from .request import Request, Result
from .results import unit_scores
from .scores import Salience, Scores, load_salience, save_salience
from .super_experts import ExpertPeaks, read_peaks
from .taylor import VARIANTS


def score(
    model: PreTrainedModel,
    graph: CouplingGraph,
    calibration: Any = None,
    criterion: str | Callable[..., Any] = "taylor",
    *,
    taylor: str = "param_first",
    aggregation: str = "sum",
    kinds: Iterable[str] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    weights: Iterable[tuple[str, torch.Tensor]] | None = None,
    most: int | None = None,
    cache: Path | None = None,
    protect_super_experts: bool = False,
) -> Scores:
    """Score every index of every unit of the graph; a higher score means more important.

    Args:
        model: model that ``graph`` was traced from, with its weights. It is not changed.
        graph: graph of the model, from :func:`llm_pruner.trace`.
        calibration: token ids, LongTensor ``[samples, tokens]``, or inputs by name, as a processor returns them.
            ``random``, ``l1`` and ``l2`` need none.
        criterion: ``random``; of weights, ``l1`` and ``l2`` (:mod:`~llm_pruner.importance.magnitude`); of gradients,
            ``taylor`` (:mod:`~llm_pruner.importance.taylor`); of activations, ``activation``, ``wanda`` and ``flap``
            (:mod:`~llm_pruner.importance.activation`); for whole layers, ``block_influence``, ``cosine``,
            ``loss_change``, ``loss``, ``contiguous``, ``last`` and ``spaced_middle``
            (:mod:`~llm_pruner.importance.layers`). Or your own: a registered name
            (:func:`~llm_pruner.importance.criteria.register_criterion`), ``package.module:function``, a function, or
            an instance of torch-pruning's ``Importance`` (:mod:`~llm_pruner.importance.torch_pruning`).
        taylor: variant of ``taylor``: ``vectorize``, ``param_first``, ``param_second`` or ``param_mix``.
        aggregation: over the slices of a unit: ``sum``, ``mean``, ``max``, ``prod``, ``first`` or ``last``.
        kinds: kinds of units to score (None: all that the criterion scores). Fewer kinds need fewer gradients.
        seed: seed of ``random``, passed to criteria of your own.
        device: device to compute on, if not the model's: weights are moved there block by block. 16-bit weights on the
            CPU are always upcast to float32, block by block.
        weights: pairs of name and weight to read one after the other instead of the model's, which may then be on the
            meta device (:func:`llm_pruner.checkpoint.stored.weights_in` reads them from files). Criteria of gradients
            and activations run the model, with its own weights.
        most: largest number of layers that will be removed from a stack; ``loss`` measures no further.
        cache: file of a built-in criterion's numbers per channel, before aggregation: read if it has those of these
            kinds, else written. Give another file for another model, calibration set or criterion. A file beside it
            keeps what Taylor has done of a large calibration set until all is done, so that a call that was killed can
            be repeated.
        protect_super_experts: give super experts (:mod:`~llm_pruner.importance.super_experts`) a score of infinity, so
            that they stay. Criteria that read the outputs of experts find them in the same pass, others in one more.

    Returns:
        Scores, with a float64 tensor ``[unit.size]`` for each unit.

    Raises:
        PrunerError: a name is not valid, the graph is another model's, the calibration set cannot be read, a gradient
            is not finite, or the result of a criterion has the wrong form.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> import llm_pruner as lp
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
    ... )
    >>> model = LlamaForCausalLM(config)
    >>> ids = torch.arange(32).view(2, 16)  # two samples of 16 tokens
    >>> scores = lp.score(model, lp.trace(model), ids, "taylor", kinds=["heads", "neurons"])
    >>> for name, values in scores.values.items():
    ...     print(name, list(values.shape))
    model.layers.0.self_attn.heads [4]
    model.layers.0.mlp.neurons [24]
    model.layers.1.self_attn.heads [4]
    model.layers.1.mlp.neurons [24]
    """
    _check_choice("taylor", taylor, VARIANTS)
    _check_choice("aggregation", aggregation, AGGREGATIONS)
    if kinds is not None:
        kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        for kind in kinds:
            _check_choice("kind", kind, KINDS)
    _check_graph(model, graph)
    compute = native_compute(model) if device is None else native_compute(model).on(torch.device(device))
    if isinstance(criterion, str) and criterion in STRATEGIES:
        values = _score_layers(model, graph, calibration, criterion, kinds=kinds, compute=compute, most=most)
        return Scores(values, {"criterion": criterion, "aggregation": aggregation, "seed": seed})
    name, entry = resolve_criterion(criterion)
    if entry.needs_weights and (weights is None or (entry.builtin and entry.needs_calibration)):
        _check_weights(model, name)
    units = graph.units if kinds is None else graph.of_kind(*kinds)
    dims = dims_to_score(units, {n: p.ndim for n, p in model.named_parameters()})
    request = Request(
        model=model,
        units=units,
        dims=dims,
        calibration=calibration,
        taylor=taylor,
        seed=seed,
        compute=compute,
        weights=weights or stored_tensors(model).items(),
        peaks=ExpertPeaks(model, units) if protect_super_experts and (kinds is None or "experts" in kinds) else None,
        unfinished=NOTHING_KEPT if cache is None or count() > 1 else Unfinished(_part(cache), dims),
    )
    values = unit_scores(name, _compute(entry, request, cache), request, aggregation)
    values = {unit: from_first(scores) for unit, scores in values.items()}
    _check_complete(name, entry, units, values, requested=kinds is not None)
    settings: dict[str, Any] = {"criterion": name, "aggregation": aggregation, "seed": seed}
    settings |= {"taylor": taylor} if name == "taylor" else {}
    if request.peaks is not None and (super_experts := _protect(request, request.peaks, values)):
        settings["super_experts"] = super_experts
    return Scores(values, settings)


def _protect(request: Request, peaks: ExpertPeaks, values: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    """Raise the scores of super experts that have any to infinity; return these experts by the name of their unit."""
    if not peaks.has_run:
        read_peaks(request.model, peaks, request.tokens, request.compute)
    found = {name: experts for name, experts in peaks.super_experts().items() if name in values}
    for name, experts in found.items():
        values[name] = values[name].index_fill(0, torch.tensor(experts), torch.inf)
        log.info("super experts of %s stay: %s", name, ", ".join(map(str, experts)))
    return found


def _compute(entry: Entry, request: Request, cache: Path | None) -> Result:
    """Return the result of a criterion for a request, from the cache if possible."""
    if cache is None or not entry.builtin:
        return entry.function(request)
    salience = load_salience(cache, request.dims)
    if salience is not None:
        return salience
    result = entry.function(request)
    if all(isinstance(key, tuple) for key in result):
        save_salience(cast(Salience, result), cache, request.dims)
    _part(cache).unlink(missing_ok=True)
    return result


def _part(cache: Path) -> Path:
    """Return the file of what is done until the scores are complete."""
    return cache.with_name(f"{cache.name}.part")


def score_blocks(
    model: PreTrainedModel,
    graph: CouplingGraph,
    calibration: Any,
    strategy: str,
    *,
    blocks: Mapping[str, Sequence[str | None]],
    most: Mapping[str, int],
    device: str | torch.device,
) -> dict[str, torch.Tensor]:
    """Score one block of each layer, such as its attention, by a criterion for layers.

    Args:
        calibration: as for :func:`score`.
        strategy: one of :data:`~llm_pruner.importance.layers.STRATEGIES`.
        blocks: by unit of kind ``layers``, the path of the block in each of its layers, None where none can go.
        most: number of blocks that will go, by unit.
        device: device to compute on.

    Returns:
        By unit, float64 ``[layers]``, infinite for layers whose block stays.

    Raises:
        PrunerError: the calibration set cannot be read, or the criterion is not for blocks of this model.
    """
    compute = native_compute(model).on(torch.device(device))
    calibration = _layer_inputs(model, strategy, calibration)
    scores = {}
    for name, number in most.items():
        modules = [None if path is None else model.get_submodule(path) for path in blocks[name]]
        values = score_layers(
            model, graph.unit(name), strategy, calibration, compute=compute, most=number, blocks=modules
        )
        scores[name] = values if values.ndim == 1 else values[number - 1]
    return scores


def _layer_inputs(model: PreTrainedModel, strategy: str, calibration: Any) -> Any:
    """Return checked inputs for a criterion for layers, or as they are if it reads none."""
    if strategy in BY_POSITION:
        return calibration
    _check_weights(model, strategy)
    return check_calibration(model, calibration)


def _score_layers(
    model: PreTrainedModel,
    graph: CouplingGraph,
    calibration: Any,
    strategy: str,
    *,
    kinds: tuple[str, ...] | None,
    compute: Compute,
    most: int | None,
) -> dict[str, torch.Tensor]:
    if kinds not in (None, ("layers",)):
        raise PrunerError(f"{strategy} scores layers only: give kinds=['layers'], or another criterion")
    calibration = _layer_inputs(model, strategy, calibration)
    stacks = graph.of_kind("layers")
    return {u.name: score_layers(model, u, strategy, calibration, compute=compute, most=most) for u in stacks}


def _check_complete(
    name: str, entry: Entry, units: list[Unit], values: dict[str, torch.Tensor], *, requested: bool
) -> None:
    """Refuse units without scores, unless the criterion skips some and none of them was asked for by kind."""
    missing = next((unit for unit in units if unit.name not in values), None)
    if missing is None:
        return
    if entry.skips is None:
        raise PrunerError(
            f"criterion {name!r} returned nothing for unit {missing.name}: return a tensor [{missing.size}] under its "
            "name or a number per channel for one of its dims, or score other kinds"
        )
    if requested or not values:
        raise PrunerError(f"{name} does not score {missing.name}: {entry.skips}")


def _check_choice(what: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise PrunerError(f"{what} {value!r} is not valid: choose from {', '.join(choices)}")


def _check_weights(model: PreTrainedModel, criterion: str) -> None:
    if any(parameter.is_meta for parameter in model.parameters()):
        raise PrunerError(f"{criterion} needs weights, and this model has none: load it with llm_pruner.load")


def _check_graph(model: PreTrainedModel, graph: CouplingGraph) -> None:
    tensors = stored_tensors(model)
    for name, shape in graph.shapes.items():
        actual = list(tensors[name].shape) if name in tensors else "absent"
        if actual != list(shape):
            raise PrunerError(f"the graph is of another model: {name} is {list(shape)} in it, {actual} in this model")

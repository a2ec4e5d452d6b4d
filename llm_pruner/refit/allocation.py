"""Allocation by search: choose the widths of layers whose refitted model is closest to the original.

Three rooms meet: :mod:`llm_pruner.selection.search` proposes widths, :mod:`.ladder` has the refits of all of them, and
:mod:`.candidates` compares the refitted model with the original. The layers are fitted on most of the calibration set,
and candidates are compared on the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import lcm
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..errors import PrunerError
from ..graph.units import CouplingGraph, Unit
from ..importance.scores import Scores
from ..logs import log
from ..models.inputs import Inputs, hash_of, tokens_per_sample
from ..models.running import check_calibration
from ..provenance import versions
from ..selection.budgets import Budget, parameter_budget
from ..selection.per_kind import layers_by_kind
from ..selection.plan import PruningPlan
from ..selection.ranking import ALIGNMENTS, alignment, role
from ..selection.search import ALLOCATION, Genome, SearchSpace, evolve, search_space
from ..selection.select import SHARDED, WHOLE_MODEL, select
from ..unfinished import Unfinished
from .candidates import Candidates
from .ladder import Ladder, build_ladder
from .training import hold_out

GENERATIONS = 24
TOKENS = 2048  # on which candidates are compared
LARGEST_PART = 4  # at most one sample of so many compares candidates
MIN_SAMPLES = 44  # of which three quarters are enough for a refit


def search(
    model: PreTrainedModel,
    graph: CouplingGraph,
    scores: Scores,
    calibration: Inputs,
    *,
    target_params: float | str | None = None,
    budget: Budget | None = None,
    start: PruningPlan | None = None,
    original: PreTrainedModel | None = None,
    kept: Sequence[int] | None = None,
    refit: bool = True,
    generations: int = GENERATIONS,
    seed: int = 0,
    cache: Path | None = None,
    **options: Any,
) -> PruningPlan:
    """Choose how many indices each unit keeps by evolution: the refitted model is to predict what the original does.

    Args:
        model: model that ``graph`` was traced from, with its weights. It is not changed.
        graph: graph of the model.
        scores: which indices of a unit go first.
        calibration: LongTensor ``[samples, tokens]`` or other inputs. At most a quarter of the samples, of 2,048 tokens
            in all, compares candidates; the others fit them.
        target_params: parameters that stay, as of :func:`llm_pruner.select`.
        budget: the same for another cost.
        start: plan that the search starts from and that meets the budget (default: that of :func:`llm_pruner.select`
            with the same options).
        original: model that ``model`` is left of after layers were dropped (default: ``model``).
        kept: indices of the original's layers that ``model`` has (default: all).
        refit: compare refitted candidates (:mod:`llm_pruner.refit.ladder`), not merely masked ones. Models without a
            closed form are never refitted here.
        generations: generations of the evolution.
        seed: of the mutations.
        cache: file of the distances of candidates, which a search that was killed goes on with.
        options: ``kinds``, ``layers``, ``round_to``, ``floor``, ``align``, ``tensor_parallel`` and ``uniform`` of
            :func:`llm_pruner.select`. With ``uniform``, counterparts in all layers have one width, so that the search
            is for the split of the budget between kinds.

    Returns:
        The plan. ``plan.settings["allocation"]`` records the distance at the start and after every generation.

    Raises:
        PrunerError: there is no budget or nothing to search, the calibration set is too small, or zeros do not stand
            for the removal of these units.

    >>> import torch, llm_pruner as lp
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=2, **sizes))
    >>> graph, ids = lp.trace(model), torch.randint(96, (64, 8))
    >>> scores = lp.score(model, graph, criterion="l2")
    >>> plan = lp.search(model, graph, scores, ids, target_params=0.8, kinds=["neurons"], generations=2)
    >>> len(plan.settings["allocation"]["distances"])  # at the start and after each generation
    3
    """
    budget = budget if target_params is None else parameter_budget(graph, target_params)
    if budget is None:
        raise PrunerError("a search needs a budget: give target_params or budget")
    calibration = check_calibration(model, calibration)
    if len(calibration) < MIN_SAMPLES:
        raise PrunerError(f"a search needs at least {MIN_SAMPLES} calibration samples, not {len(calibration)}")
    options = _read_once(options)
    units = searched_units(graph, options)
    start = start or select(graph, scores, budget=budget, **options)
    space = search_space(
        graph,
        units,
        steps={unit.name: _step(unit, options) for unit in units},
        floor=options.get("floor", 0.0),
        start=start,
        budget=budget,
        plan_at=lambda counts: _plan_at(graph, scores, counts, options),
        alike=options.get("uniform", False),
    )
    samples = max(1, min(len(calibration) // LARGEST_PART, TOKENS // tokens_per_sample(calibration)))
    fitted, compared = hold_out(calibration, samples)
    ladder = _ladder(original or model, model, graph, fitted, space, start=start, kept=kept) if refit else Ladder()
    candidates = Candidates(original or model, model, graph, ladder, compared)
    key: list[Any] = [versions(), model.name_or_path, hash_of(calibration), refit, kept, space.widths(space.start)]
    key += [{name: value.tolist() for name, value in scores.values.items()}]
    distances = Distances(space, candidates, Unfinished(cache, key))
    evolution = evolve(space, distances, generations=generations, seed=seed)
    plan = space.finish(evolution.best)
    log.info(
        "search: distance from the original %.4g -> %.4g in %d generations",
        evolution.distances[0],
        evolution.distances[-1],
        generations,
    )
    plan.settings = {name: value for name, value in start.settings.items() if name not in ("ratio", "layers")}
    if options["layers"] is not None:
        plan.settings["layers"] = {kind: sorted(layers) for kind, layers in options["layers"].items()}
    plan.settings |= {"scope": "search", ALLOCATION: {"seed": seed, "distances": evolution.distances}}
    plan.notes += start.notes
    return plan


class Distances:
    """The distances of genomes from the original, each measured once and kept at once: a model has to run for it."""

    def __init__(self, space: SearchSpace, candidates: Candidates, unfinished: Unfinished):
        self.space, self.candidates, self.unfinished = space, candidates, unfinished
        last = unfinished.read()
        self.known: dict[str, float] = last.record if last else {}

    def __call__(self, genome: Genome, share: float) -> float:
        widths = self.space.widths(genome)
        name = f"{share} {','.join(map(str, widths.values()))}"
        if name not in self.known:
            self.known[name] = self.candidates.distance(widths, self.space.plan_at(widths), share)
            self.unfinished.write({}, self.known)
        return self.known[name]


def _read_once(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with their kinds as a tuple and layers by kind: iterators can be read once only."""
    kinds = options.get("kinds", ("heads", "neurons"))
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    return {**options, "kinds": kinds, "layers": layers_by_kind(options.get("layers"), kinds)}


def searched_units(graph: CouplingGraph, options: Mapping[str, Any]) -> list[Unit]:
    """Return the units whose widths are searched.

    Args:
        options: of :func:`search`.

    Raises:
        PrunerError: a kind runs through the whole model, zeros do not stand for the removal of a unit, or there is one
            width alone.
    """
    options = _read_once(options)
    kinds, layers = options["kinds"], options["layers"] or {}
    if whole := [kind for kind in kinds if kind in WHOLE_MODEL]:
        raise PrunerError(f"a search is for widths of layers, not for {whole[0]}: choose other kinds")
    units = [unit for unit in graph.of_kind(*kinds) if unit.kind not in layers or unit.layer in layers[unit.kind]]
    if flagged := sorted({unit.kind for unit in units if unit.flags and unit.kind != "experts"}):
        raise PrunerError(
            f"a search compares masked models, and removing {' and '.join(flagged)} of {graph.model_class} is not the "
            "same as zeroing them: use another allocation"
        )
    if units and len({role(unit) if options.get("uniform") else unit.name for unit in units}) < 2:
        raise PrunerError("a search exchanges widths between units, and there is one width alone: add kinds or layers")
    return units


def _step(unit: Unit, options: Mapping[str, Any]) -> int:
    """Return the step of a unit's kept count."""
    parts = options.get("tensor_parallel", 1) if unit.kind in SHARDED else unit.groups
    aligned = alignment(unit, ALIGNMENTS[0] if options.get("align") else 1)
    return lcm(options.get("round_to", 1), parts * unit.block, unit.multiple, aligned)


def _plan_at(
    graph: CouplingGraph, scores: Scores, counts: Mapping[str, int], options: Mapping[str, Any]
) -> PruningPlan:
    """Return the plan that leaves some kept counts, an empty one if these are all indices."""
    if all(graph.unit(name).size == count for name, count in counts.items()):
        return PruningPlan()
    return select(graph, scores, counts=counts, tensor_parallel=options.get("tensor_parallel", 1))


def _ladder(
    original: PreTrainedModel,
    model: PreTrainedModel,
    graph: CouplingGraph,
    calibration: Inputs,
    space: SearchSpace,
    *,
    start: PruningPlan,
    kept: Sequence[int] | None,
) -> Ladder:
    """Return the refits of all widths of the search; none for a model that has no closed form."""
    rungs = {
        unit.name: {count: space.plan_at({unit.name: count}) for count in gene.widths}
        for gene in space.genes
        for unit in gene.units
    }
    try:
        return build_ladder(original, model, graph, calibration, rungs=rungs, start=start, kept=kept)
    except PrunerError as error:
        log.info("candidates are not refitted: %s", error)
        return Ladder()

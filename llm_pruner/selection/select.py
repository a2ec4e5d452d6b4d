"""Turn scores into a plan: decide how many indices each unit loses, and which."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import torch

from ..errors import PrunerError
from ..graph.units import KINDS, CouplingGraph, Unit
from ..importance.scores import Scores
from .budgets import Budget, NothingRemoved, NotMet, parameter_budget, solve
from .per_kind import SCOPES, LayerChoice, PerKind, check_choices, choice_for, layers_by_kind
from .plan import PruningPlan, name_after
from .ranking import (
    ALIGNMENTS,
    NORMALIZERS,
    alignment,
    by_block,
    equalized,
    index_costs,
    most_removable,
    notes_on_experts,
    rank_balanced,
    rank_globally,
    rank_locally,
    role,
)

SHARDED = ("heads", "neurons", "channels")  # what tensor parallelism splits
WHOLE_MODEL = ("hidden", "vocabulary", "layers")


def select(
    graph: CouplingGraph,
    scores: Scores,
    ratio: float | Mapping[str, float] = 0.25,
    kinds: Iterable[str] = ("heads", "neurons"),
    *,
    layers: LayerChoice = None,
    scope: PerKind = "local",
    round_to: int = 1,
    target_params: float | str | None = None,
    budget: Budget | None = None,
    normalize: PerKind = "none",
    floor: float = 0.0,
    align: bool = False,
    tensor_parallel: int = 1,
    uniform: bool = False,
    counts: Mapping[str, int] | None = None,
) -> PruningPlan:
    """Choose which indices of which units stay: those with the highest scores.

    Args:
        graph: from :func:`llm_pruner.trace`.
        scores: from :func:`llm_pruner.score`.
        ratio: share of a unit's indices to remove, strictly between 0 and 1; or a mapping from kind to share, which
            then says the kinds too (with a target, the proportions in which they go). As LLM-Pruner counts: a unit
            of n channels loses ``n - int(n * (1 - ratio))``, in whole indices, rounded down. None is a valid
            outcome for a unit with few heads, and the plan's notes say so.
        kinds: kinds of units to prune.
        layers: layer indices to prune in (of an encoder-decoder in both halves), None for all; or a mapping from kind
            to layer indices (a kind without an entry is pruned everywhere). The kinds ``hidden``, ``vocabulary`` and
            ``layers`` ignore the argument; other units that span layers are left out when layers are given.
        scope: ``local`` takes the ratio from every unit; ``global`` takes it from all units of a kind together, those
            indices first that score least per removed parameter. Or a mapping from kind to scope; a kind without an
            entry is pruned locally.
        round_to: kept counts become multiples of this, and of the unit's own ``multiple``, rounded up.
        target_params: instead of a ratio, the parameters that stay: a fraction of the model, or a count such as
            ``"5.4B"``. The ratio is solved so that the plan leaves at most that many, and at most 0.5% fewer.
        budget: the same for another cost (:func:`llm_pruner.evaluation.cost.macs_budget`, ``memory_budget``).
        normalize: divisor of global scores, to compare layers: ``none``, ``mean`` (the mean score of the unit) or
            ``sqrt`` (the square root of the mean). Or a mapping from kind to divisor; a kind without an entry has none.
        floor: share of every unit's indices that stays in any case, at least 0 and below 1.
        align: keep widths at multiples of 8 to 128 channels, at which kernels for matrix products are fast: multiples
            of the largest power of two that divides a unit's size and leaves it at least 32 steps. Heads are not
            aligned. If a target cannot be met in such steps, the largest smaller power of two that meets it is used,
            and a note of the plan says so.
        tensor_parallel: number of devices that must be able to share the heads, neurons and channels equally: kept
            counts are multiples of it, with as many indices in each of as many equal parts of a unit.
        uniform: keep the same number of indices in every layer, so that a config without per-layer values describes
            the result. Which indices stay still differs by layer. Needs ``scope="local"`` and no ``layers``.
        counts: number of indices that stay, by the name of a unit or by kind (in the layers given), whatever the
            ratio, ``round_to``, ``floor``, ``align`` and ``tensor_parallel``. Without a target and without a mapping
            for a ratio, no other unit loses indices.

    Returns:
        The plan. It holds the kept indices of every unit that loses some, and the arguments in ``settings``.

    Raises:
        PrunerError: an argument is out of range, or there is nothing to prune.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from llm_pruner import score, trace
    >>> sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=2, **sizes))
    >>> graph = trace(model)
    >>> plan = select(graph, score(model, graph, criterion="l2"), ratio=0.25, kinds=("neurons",))
    >>> {name: len(choice.kept) for name, choice in plan.units.items()}
    {'model.layers.0.mlp.neurons': 36, 'model.layers.1.mlp.neurons': 36}
    """
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    by_kind = ratio if isinstance(ratio, Mapping) else dict.fromkeys(kinds, ratio)
    only_counts = counts is not None and target_params is budget is None and not isinstance(ratio, Mapping)
    if not by_kind and not (counts and target_params is budget is None):
        raise PrunerError(f"no kind of unit is named: choose from {', '.join(KINDS)}")
    counted = [unit.kind for unit in graph.units if counts and (unit.name in counts or unit.kind in counts)]
    kinds = tuple(dict.fromkeys(counted if only_counts else [*by_kind, *counted]))
    policy = Policy(
        graph,
        by_block(scores, graph),
        kinds,
        layers_by_kind(layers, kinds),
        scope,
        round_to,
        normalize,
        floor,
        ALIGNMENTS[0] if align else 1,
        tensor_parallel,
        uniform,
        counts or {},
    )
    if only_counts:
        return policy.plan({})
    if target_params is not None:
        budget = parameter_budget(graph, target_params)
    shares = dict(by_kind)
    for share in shares.values():
        if not 0 < share < (1 if budget is None else float("inf")):
            raise PrunerError(f"ratio {share} is out of range: give a share between 0 and 1, both excluded")
    if budget is None:
        return policy.plan(shares)
    largest = max(shares.values())
    shares = {kind: share / largest for kind, share in shares.items()}

    policy = replace(policy, solving=True)
    if not align:
        return _solve_target(policy, budget, shares)
    for widest in ALIGNMENTS:
        try:
            plan = _solve_target(replace(policy, align=widest), budget, shares)
        except NotMet:
            if widest == 1:
                raise
            continue
        if widest < ALIGNMENTS[0]:
            steps = f"multiples of {widest} at most" if widest > 1 else "not aligned"
            plan.notes.append(f"widths are {steps}: in larger steps the target cannot be met")
        return plan
    raise AssertionError("the last alignment is none")


def _solve_target(policy: Policy, budget: Budget, shares: Mapping[str, float]) -> PruningPlan:
    """Return the plan that meets a budget, removing kinds in the proportions ``shares``.

    Where one step of units that go together is too large, as a head of every layer is, these units stay as they are
    before that step, and the others go on.

    Raises:
        NotMet: no plan comes near the budget.
    """

    def plan_at(ratio: float) -> PruningPlan:
        return policy.plan({kind: ratio * share for kind, share in shares.items()})

    if not policy.uniform:
        return solve(policy.graph, budget, plan_at)
    try:
        return solve(policy.graph, budget, plan_at, lambda name: role(policy.graph.unit(name)))
    except NotMet as error:
        fixed = {name: policy.graph.unit(name).size for name in error.step}
        fixed |= {name: len(choice.kept) for name, choice in error.above.units.items() if name in fixed}
        if fixed.keys() <= policy.counts.keys():
            raise
        try:
            plan = _solve_target(replace(policy, counts={**policy.counts, **fixed}), budget, shares)
        except PrunerError:
            raise error from None
        plan.settings["counts"] = dict(policy.counts)
        kinds = ", ".join(sorted({policy.graph.unit(name).kind for name in error.step}))
        plan.notes.append(f"{kinds}: {len(error.step)} units stop where one step in every layer is too large")
        return plan


@dataclass(frozen=True)
class Policy:
    """The arguments of :func:`select` without the ratio: a policy makes a plan for any ratio.

    Attributes:
        align: largest width in whose multiples channels stay; 1 for any.
    """

    graph: CouplingGraph
    scores: Scores
    kinds: tuple[str, ...]
    layers: dict[str, set[int]] | None
    scope: PerKind
    round_to: int
    normalize: PerKind
    floor: float
    align: int
    tensor_parallel: int
    uniform: bool
    counts: Mapping[str, int]
    solving: bool = False  # for a target: what must stay stays, whatever the ratio

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise PrunerError(f"kind {kind!r} is not valid: choose from {', '.join(KINDS)}")
        check_choices("scope", self.scope, SCOPES)
        check_choices("normalize", self.normalize, NORMALIZERS)
        for name in ("round_to", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise PrunerError(f"{name} {getattr(self, name)} is out of range: give 1 or more")
        if self.uniform and ("global" in map(self._scope_of, self.kinds) or self.layers is not None):
            raise PrunerError("uniform keeps the same number of indices per layer: leave out layers and scope='global'")
        if not 0 <= self.floor < 1:
            raise PrunerError(f"floor {self.floor} is out of range: give a share of at least 0 and below 1")
        names = {name for unit in self.graph.units for name in (unit.name, unit.kind)}
        if unknown := sorted(self.counts.keys() - names):
            raise PrunerError(f"the model has no unit or kind of units called {unknown[0]!r}")
        present = {unit.layer for unit in self.graph.units if unit.layer is not None}
        if missing := sorted(set().union(*(self.layers or {}).values()) - present):
            top = f"layers 0 to {max(present)}" if present else "no layers"
            raise PrunerError(
                f"layer {', '.join(map(str, missing))} out of range: the model has {top} that can be pruned"
            )

    def _scope_of(self, kind: str) -> str:
        return choice_for(self.scope, kind, "local")

    def _in_requested_layers(self, unit: Unit) -> bool:
        """Return True if a unit lies in the requested layers, as kinds without an entry and whole-model units do."""
        if self.layers is None or unit.kind in WHOLE_MODEL or unit.kind not in self.layers:
            return True
        return unit.layer in self.layers[unit.kind]

    def plan(self, ratios: Mapping[str, float]) -> PruningPlan:
        """Make the plan that removes a share of each kind, and keeps the stated count of units that have one.

        Raises:
            PrunerError: a count is out of range, or for a unit that the model does not have.
            NothingRemoved: no unit loses an index.
        """
        plan = PruningPlan(
            settings={
                "ratio": next(iter(ratios.values()), None) if len(set(ratios.values())) < 2 else dict(ratios),
                "kinds": list(self.kinds),
                "scope": self.scope,
                "round_to": self.round_to,
                **self._nondefault_settings(),
                **self.scores.settings,
            }
        )
        every = dict.fromkeys([*self.kinds, *KINDS])
        for kind in sorted(every, key=lambda kind: kind != "layers"):  # units in removed layers are left out
            units = [unit for unit in self.graph.of_kind(kind) if not _is_removed(unit, plan)]
            for unit in units:
                if (count := self._count(unit)) is not None:
                    self._remove(plan, unit, self._indices_beyond(unit, count))
            if kind in ratios:
                self._prune_kind(plan, kind, units, ratios[kind])
        if not plan.units:
            self._refuse_empty_plan(ratios)
        return plan

    def _count(self, unit: Unit) -> int | None:
        """Return how many indices of a unit are to stay by ``counts``, None if its kind's ratio decides."""
        by_kind = self.counts.get(unit.kind) if self._in_requested_layers(unit) else None
        return self.counts.get(unit.name, by_kind)

    def _prune_kind(self, plan: PruningPlan, kind: str, units: list[Unit], ratio: float) -> None:
        """Remove a share of the units of one kind that have no count, and note the units that lose nothing."""
        pruned = [unit for unit in units if self._in_requested_layers(unit) and self._count(unit) is None]
        for unit in pruned:
            self.scores.of(unit)
        if spanning := [unit for unit in units if unit.layer is None and not self._in_requested_layers(unit)]:
            plan.notes.append(f"{kind}: {len(spanning)} units span layers: left out, since layers were given")
        if self._scope_of(kind) == "local" and not self.solving:
            plan.notes += notes_on_experts(pruned, ratio)
        unchanged = 0
        for unit, removed in zip(pruned, self._removals(kind, pruned, ratio, plan), strict=True):
            self._remove(plan, unit, removed)
            unchanged += not removed.numel()
        if unchanged:
            plan.notes.append(
                f"{kind}: {unchanged} of {len(pruned)} units lose nothing at ratio {ratio} "
                f"({pruned[0].size} indices in the first)"
            )

    def _nondefault_settings(self) -> dict[str, Any]:
        """Return the settings that differ from their defaults, for the record."""
        layers = {kind: sorted(chosen) for kind, chosen in self.layers.items()} if self.layers is not None else None
        defaults: dict[str, Any] = {"layers": None, "normalize": "none", "floor": 0.0, "align": False}
        defaults |= {"tensor_parallel": 1, "uniform": False, "counts": {}}
        settings = {name: getattr(self, name) for name in defaults}
        settings |= {"layers": layers, "align": self.align > 1, "counts": dict(self.counts)}
        return {name: value for name, value in settings.items() if value != defaults[name]}

    def _refuse_empty_plan(self, ratios: Mapping[str, float]) -> None:
        """Raise an error that says why no index is removed."""
        if self.counts:
            raise NothingRemoved("no index is removed: the counts keep all indices of every unit")
        units = [unit for unit in self.graph.of_kind(*self.kinds) if self._in_requested_layers(unit)]
        if not units:
            kinds = ", ".join(sorted({unit.kind for unit in self.graph.units})) or "none"
            where = "" if self.layers is None else " in the layers given"
            raise PrunerError(
                f"nothing to prune: no unit of kind {', '.join(self.kinds)}{where} (kinds found: {kinds})"
            )
        sizes = sorted({unit.size for unit in units})
        raise NothingRemoved(
            f"ratio {', '.join(str(r) for r in dict.fromkeys(ratios.values()))} removes nothing: the units have "
            f"{', '.join(map(str, sizes))} indices, which are removed as a whole: raise the ratio"
        )

    def _indices_beyond(self, unit: Unit, count: int) -> torch.Tensor:
        """Return the indices of a unit to remove so that ``count`` of them stay.

        Raises:
            PrunerError: the unit or the model cannot have that count.
        """
        if not unit.minimum <= count <= unit.size:
            raise PrunerError(
                f"{unit.name} has {unit.size} indices and cannot keep {count}: give {unit.minimum} to {unit.size}"
            )
        if count == unit.size:
            return torch.tensor([], dtype=torch.long)
        if count % unit.block:
            raise PrunerError(f"{unit.name} cannot keep {count}: its quantized weights go in blocks of {unit.block}")
        if count % unit.multiple and unit.kind != "hidden":  # a shape may give that other heads to divide it
            raise PrunerError(f"{unit.name} cannot keep {count}: the model runs with multiples of {unit.multiple} only")
        if count % unit.groups:
            raise PrunerError(f"{unit.name} cannot keep {count}: its router has {unit.groups} groups of equal size")
        gone, shards = unit.size - count, self.tensor_parallel if unit.kind in SHARDED else 1
        parts = unit.groups if gone % shards or unit.size % shards else max(unit.groups, shards)
        return rank_balanced(self.scores.of(unit, gone), gone, parts)

    def _removals(self, kind: str, units: list[Unit], ratio: float, plan: PruningPlan) -> list[torch.Tensor]:
        """Return the indices that each unit of a kind loses."""
        parts = [self.tensor_parallel if kind in SHARDED else unit.groups for unit in units]
        steps = [
            lcm(self.round_to, n * unit.block, unit.multiple, alignment(unit, self.align))
            for unit, n in zip(units, parts, strict=True)
        ]
        if self._scope_of(kind) == "local":
            removals = rank_locally(units, self.scores, ratio, steps=steps, floor=self.floor)
        else:
            removals = rank_globally(
                units,
                self.scores,
                ratio,
                steps=steps,
                floor=self.floor,
                costs=index_costs(units, self.graph),
                normalizer=NORMALIZERS[choice_for(self.normalize, kind, "none")],
            )
        for i, unit in enumerate(units):
            if unit.size % (parts[i] * unit.block):
                plan.notes.append(f"{unit.name} has {unit.size} indices, which {parts[i]} devices cannot share equally")
                parts[i] = 1
            if self.solving:
                scores = self.scores.of(unit, len(removals[i]))
                removals[i] = removals[i][: most_removable(unit, scores, parts=parts[i], step=steps[i])]
        removals = equalized(units, removals) if self.uniform else removals
        for i, unit in enumerate(units):
            if parts[i] > 1:
                gone = len(removals[i])
                removals[i] = rank_balanced(self.scores.of(unit, gone), gone, parts[i])
        return removals

    def _remove(self, plan: PruningPlan, unit: Unit, removed: torch.Tensor) -> None:
        if not removed.numel():
            return
        scores = self.scores.of(unit, len(removed))
        if bool(scores[removed].isposinf().any()):
            stay = ", ".join(str(i) for i in scores.isposinf().nonzero().flatten().tolist())
            raise PrunerError(
                f"{unit.name}: {len(removed)} indices cannot be removed, since {stay} must stay: remove fewer"
            )
        stays = torch.ones(unit.size, dtype=torch.bool)
        stays[removed] = False
        plan.keep(unit, stays.nonzero().flatten(), self.graph.shapes)
        plan.units[unit.name].explain(scores)


def _is_removed(unit: Unit, plan: PruningPlan) -> bool:
    """Return True if a unit lies in layers that the plan removes."""
    return bool(plan.layers) and all(name_after(name, plan) is None for name in unit.parameters)

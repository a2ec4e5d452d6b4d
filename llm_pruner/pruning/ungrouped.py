"""Rank every weight alone, as if the weights of a unit did not depend on each other: LLM-Pruner's ablation (table 6).

Every weight keeps the same number of indices, but its own ones: the rows of ``gate_proj`` no longer meet the rows of
``up_proj`` that they were trained with. Shapes fit, and the model runs; what it has learnt is lost.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from ..choices import UNGROUPED
from ..graph.units import CouplingGraph
from ..selection.plan import PruningPlan

OWNER = ": "  # between the name of a unit and that of the module whose weight is ranked


def split_units(graph: CouplingGraph, kinds: Iterable[str]) -> CouplingGraph:
    """Return a graph whose units of some kinds are split: every module that a unit runs through is a unit of its own.

    A bias stays with the weight of its module.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from llm_pruner import trace
    >>> sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4)
    >>> graph = trace(LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=1, **sizes)))
    >>> [unit.name.rpartition(".")[2] for unit in split_units(graph, ["neurons"]).units]
    ['gate_proj', 'up_proj', 'down_proj']
    """
    units = []
    for unit in graph.of_kind(*kinds):
        owners: dict[str, dict[tuple[str, int], torch.Tensor]] = {}
        for (name, dim), label in unit.dims.items():
            owners.setdefault(name.rpartition(".")[0], {})[name, dim] = label
        units += [replace(unit, name=f"{unit.name}{OWNER}{owner}", dims=dims) for owner, dims in owners.items()]
    return CouplingGraph(units, graph.frozen, graph.unknown_operators, graph.shapes, on_meta=graph.on_meta)


def join_units(plan: PruningPlan) -> PruningPlan:
    """Return a plan for split units as one for the units of the model, each with the choice of its first weight."""
    units = {name.partition(OWNER)[0]: choice for name, choice in reversed(plan.units.items())}
    note = "each weight keeps indices of its own: the plan's units list those of their first weight"
    settings = plan.settings | {"aggregation": UNGROUPED}
    return replace(plan, units=dict(reversed(units.items())), settings=settings, notes=[*plan.notes, note])

"""The permutation oracle: test that a unit of the graph is right.

If the dims of a unit really are one axis, reordering its indices in all of them changes nothing in the model's output;
if each dim matters, reordering all but one does change it. Each test takes a forward pass, builds no other model, and
works for normalised axes too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..models.inputs import example_inputs
from ..models.running import logits, relative_difference, tracing_mode
from .constants import selecting_constants
from .units import CouplingGraph, Unit

LOGIT_TOLERANCE = 1e-4


@dataclass
class PermutationReport:
    """Outcome for one unit; differences are relative to the largest absolute logit.

    Attributes:
        difference: change of the logits when every dim of the unit is permuted; rounding for a right unit.
        effect: change of the logits when the first dim is left out; more than rounding for a right unit that is not
            idle.
    """

    unit: Unit
    difference: float
    effect: float

    @property
    def passed(self) -> bool:
        return self.difference <= LOGIT_TOLERANCE and (self.unit.idle or self.effect > LOGIT_TOLERANCE)


@contextmanager
def permuted(model: nn.Module, unit: Unit, order: torch.Tensor, leave_out: int | None = None) -> Iterator[None]:
    """Reorder the indices of ``unit`` in the model's own weights for the length of the block."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    saved = {name: tensors[name].detach().clone() for name in unit.parameters}
    try:
        with torch.no_grad():
            for i, (name, dim) in enumerate(unit.dims):
                if i == leave_out:
                    continue
                positions = unit.positions(name, dim)
                index = torch.arange(tensors[name].shape[dim])
                index[positions.flatten()] = positions[order].flatten()
                tensors[name].copy_(tensors[name].index_select(dim, index.to(tensors[name].device)))
        with selecting_constants(model, unit.constants, order.tolist()):
            yield
    finally:
        with torch.no_grad():
            for name, value in saved.items():
                tensors[name].copy_(value)


def check_permutation(model: nn.Module, unit: Unit) -> PermutationReport:
    """Run the permutation test on one unit of a model that has its weights."""
    ids = example_inputs(model)
    order = torch.randperm(unit.size, generator=torch.Generator().manual_seed(0))
    if (order == torch.arange(unit.size)).all():
        order = order.roll(1)
    with tracing_mode(model):
        before = logits(model, ids)
        with permuted(model, unit, order):
            difference = relative_difference(logits(model, ids), before)
        with permuted(model, unit, order, leave_out=0):
            effect = relative_difference(logits(model, ids), before)
    return PermutationReport(unit, difference, effect)


def verify_units(model: nn.Module, graph: CouplingGraph) -> list[PermutationReport]:
    """Check every unit that permutation applies to, and freeze those that fail.

    Whole layers and the vocabulary have an order of their own (depth, token ids) and are left out.
    """
    reports = []
    for unit in [u for u in graph.units if u.kind not in ("layers", "vocabulary")]:
        report = check_permutation(model, unit)
        reports.append(report)
        if not report.passed:
            graph.freeze(unit, f"permuting it changes the logits by {report.difference:.1e} ({report.effect:.1e})")
    return reports

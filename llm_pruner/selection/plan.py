"""The pruning plan: what stays of a model, as data.

A plan names, for every parameter that it touches, which positions of which dims are kept. It can be read, printed, put
under version control and applied elsewhere without the model and its graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from ..errors import PrunerError
from ..graph.units import Unit
from .plan_file import FORMAT, PlanDocument, from_ranges, read_document, to_ranges, write_document

__all__ = ["FORMAT", "Choice", "PruningPlan", "name_after"]

EXPLANATION = ("removed", "lowest_kept", "highest_removed")  # what a choice keeps of the scores
Kept = dict[str, dict[int, torch.Tensor]]


@dataclass
class Choice:
    """The indices that one unit keeps, and the scores that explain the choice.

    Attributes:
        kept: sorted LongTensor of the kept indices of ``range(size)``.
        removed: sum of the removed indices' scores. With a Taylor criterion this is the predicted change of the
            calibration loss, with each slice counted as if it were removed alone.
        lowest_kept: lowest score of a kept index; its distance from ``highest_removed`` is the margin of the choice.
        highest_removed: highest score of a removed index.
    """

    kind: str
    layer: int | None
    size: int
    kept: torch.Tensor
    removed: float | None = None
    lowest_kept: float | None = None
    highest_removed: float | None = None

    def explain(self, scores: torch.Tensor) -> None:
        """Record the part of the scores ``[size]`` that explains the choice."""
        is_removed = torch.ones(self.size, dtype=torch.bool)
        is_removed[self.kept] = False
        removed_scores = scores[torch.isfinite(scores) & is_removed]  # indices removed in an earlier step have none
        if removed_scores.numel():
            self.removed, self.highest_removed = removed_scores.sum().item(), removed_scores.max().item()
            lowest = scores[self.kept].min().item()
            self.lowest_kept = lowest if isfinite(lowest) else None  # indices that must stay score infinity


@dataclass
class PruningPlan:
    """The indices of a model's units that stay, and the parameter positions that they occupy.

    Attributes:
        kept: ``{parameter: {dim: sorted LongTensor of kept positions}}`` for every pruned parameter.
        units: the choice for every unit that loses indices, by unit name.
        shapes: shape of every pruned parameter before pruning; a plan fits only a model with these shapes.
        settings: the arguments that made the plan, for the record.
        notes: remarks for the reader, such as units too small to lose an index.
        weights: SHA-256 of the checkpoint's weight files by name; empty for a plan without a checkpoint.
        blocks: paths of modules that are removed as a whole, such as the attention of a layer.

    >>> from llm_pruner.graph.units import Unit
    >>> rows, columns = ("up.weight", 0), ("down.weight", 1)
    >>> neurons = Unit("mlp.neurons", "neurons", 0, 4, dims={rows: torch.arange(4), columns: torch.arange(4)})
    >>> plan = PruningPlan()
    >>> plan.keep(neurons, torch.tensor([0, 3]), shapes={"up.weight": (4, 8), "down.weight": (8, 4)})
    >>> plan.kept
    {'up.weight': {0: tensor([0, 3])}, 'down.weight': {1: tensor([0, 3])}}
    >>> plan.cut_shape("down.weight", (8, 4))
    (8, 2)
    >>> print(plan.summary())
    neurons: 2 of 4 kept in 1 unit
    """

    kept: Kept = field(default_factory=dict)
    units: dict[str, Choice] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    weights: dict[str, str] = field(default_factory=dict)
    blocks: list[str] = field(default_factory=list)

    @property
    def layers(self) -> dict[str, torch.Tensor]:
        """Return the kept layers by path of their stack, for stacks that lose layers."""
        return {name.rpartition(".")[0]: c.kept for name, c in self.units.items() if c.kind == "layers"}

    @property
    def tokens(self) -> list[int] | None:
        """Return the kept token ids in order, whose places are the new ids; None if the vocabulary is not pruned."""
        return next((c.kept.tolist() for c in self.units.values() if c.kind == "vocabulary"), None)

    def keep(self, unit: Unit, indices: torch.Tensor, shapes: dict[str, tuple[int, ...]]) -> None:
        """Keep only ``indices`` of a unit. Several units may cut the same parameter dim.

        Raises:
            PrunerError: no index is kept, or one that the unit does not have.
        """
        indices = indices.unique()
        if not indices.numel() or int(indices[0]) < 0 or int(indices[-1]) >= unit.size:
            raise PrunerError(f"{unit.name} must keep at least one of its indices 0 to {unit.size - 1}")
        self.units[unit.name] = Choice(unit.kind, unit.layer, unit.size, indices)
        is_kept = torch.zeros(unit.size + 1, dtype=torch.bool)
        is_kept[indices], is_kept[-1] = True, True  # the last is for -1: positions that the unit does not reach
        positions_by_label: dict[int, torch.Tensor] = {}  # dims of one form share their labels
        for (name, dim), label in unit.dims.items():
            if id(label) not in positions_by_label:
                positions_by_label[id(label)] = is_kept[label].nonzero().flatten()
            positions = positions_by_label[id(label)]
            if len(positions) == len(label):
                continue
            before = self.kept.setdefault(name, {}).get(dim)
            if before is not None:
                positions = before[torch.isin(before, positions)]
            self.kept[name][dim] = positions
            self.shapes[name] = tuple(shapes[name])

    def drop_block(self, path: str, shapes: dict[str, tuple[int, ...]]) -> None:
        """Remove a module as a whole: it adds nothing to the residual stream any more."""
        self.blocks.append(path)
        for name, shape in shapes.items():
            if name.startswith(f"{path}."):
                self.kept[name] = {0: torch.tensor([], dtype=torch.long)}
                self.shapes[name] = tuple(shape)

    def cut_shape(self, name: str, shape: Iterable[int]) -> tuple[int, ...]:
        """Return the shape that a tensor of shape ``shape`` has after pruning."""
        kept = self.kept.get(name, {})
        return tuple(len(kept[dim]) if dim in kept else size for dim, size in enumerate(shape))

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        places: dict[str, int] = {}
        parameters = {}
        for name in sorted(self.kept):
            kept = {str(d): places.setdefault(to_ranges(k), len(places)) for d, k in sorted(self.kept[name].items())}
            parameters[name] = {"shape": list(self.shapes[name]), "kept": kept}
        document: dict[str, Any] = {
            "settings": self.settings,
            "notes": self.notes,
            "units": {
                name: {"kind": c.kind, "layer": c.layer, "size": c.size, "kept": to_ranges(c.kept)}
                | {key: getattr(c, key) for key in EXPLANATION if getattr(c, key) is not None}
                for name, c in self.units.items()
            },
            "positions": list(places),
            "parameters": parameters,
        }
        if self.weights:
            document["weights"] = self.weights
        if self.blocks:
            document["blocks"] = self.blocks
        write_document(path, document)

    @classmethod
    def load(cls, path: str | Path, verify: bool = False) -> PruningPlan:
        """Read a plan written by :meth:`save`.

        Args:
            verify: refuse a plan that was changed since it was written.

        Raises:
            PrunerError: the file is missing, not a plan, or names positions outside the shapes it states.
        """
        document = read_document(path, verify)
        try:
            return cls._from_document(document)
        except (IndexError, ValueError) as error:
            raise PrunerError(f"the plan {path} is damaged: {error}") from error

    @classmethod
    def _from_document(cls, document: PlanDocument) -> PruningPlan:
        plan = cls(settings=document.settings, notes=document.notes, weights=document.weights, blocks=document.blocks)
        positions = [from_ranges(text) for text in document.positions]
        for name, parameter in document.parameters.items():
            plan.shapes[name] = tuple(parameter.shape)
            plan.kept[name] = {int(dim): positions[place] for dim, place in parameter.kept.items()}
            for dim, kept in plan.kept[name].items():
                if kept.numel() and int(kept[-1]) >= plan.shapes[name][dim]:
                    raise ValueError(f"{name} keeps position {int(kept[-1])} of {plan.shapes[name][dim]}")
        for name, unit in document.units.items():
            kept = from_ranges(unit.kept)
            if not kept.numel() or int(kept[-1]) >= unit.size:
                raise ValueError(f"{name} keeps no index or one outside its {unit.size}")
            explanation = {key: getattr(unit, key) for key in EXPLANATION}
            plan.units[name] = Choice(unit.kind, unit.layer, unit.size, kept, **explanation)
        return plan

    def summary(self) -> str:
        """Describe the plan in one line per kind of unit, with its notes."""
        lines = []
        for kind in dict.fromkeys(c.kind for c in self.units.values()):
            chosen = [c for c in self.units.values() if c.kind == kind]
            kept, total = sum(c.kept.numel() for c in chosen), sum(c.size for c in chosen)
            lines.append(f"{kind}: {kept} of {total} kept in {len(chosen)} unit{'s' * (len(chosen) > 1)}")
        if self.blocks:
            lines.append(f"gone: {', '.join(self.blocks)}")
        return "\n".join([*lines, *self.notes])


def name_after(name: str, plan: PruningPlan) -> str | None:
    """Return the name of a tensor after layers and blocks are removed; None for a tensor of these."""
    if any(name.startswith(f"{path}.") for path in plan.blocks):
        return None
    for path, kept in plan.layers.items():
        if match := re.match(rf"({re.escape(path)}\.)(\d+)(\..*)", name):
            index = (kept == int(match[2])).nonzero().flatten()
            return f"{match[1]}{int(index)}{match[3]}" if index.numel() else None
    return name

"""The pruning plan: the parts of a model that stay, as data.

A plan names the kept positions of every dim of every parameter that it cuts. It can be read, printed, put under version
control and applied elsewhere without the model and its graph.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isfinite, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..display import Cells, amount, html_table, percent, plot_shares
from ..errors import PrunerError
from ..graph.places import Part, by_layer, layer_in
from ..graph.units import Unit
from .plan_file import FORMAT, MOST_LAYERS, PlanDocument, all_from_ranges, read_document, to_ranges, write_document

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FORMAT", "Choice", "PruningPlan", "name_after"]

EXPLANATION = ("total", "removed", "lowest_kept", "highest_removed")  # what a choice keeps of the scores
Kept = dict[str, dict[int, torch.Tensor]]


@dataclass
class Choice:
    """The indices that one unit keeps, and the scores that explain the choice.

    Attributes:
        kept: sorted LongTensor of the kept indices of ``range(size)``.
        total: sum of all scores that are finite.
        removed: sum of the removed indices' scores. Even for a Taylor criterion, this sum does not predict the change
            of the loss: each slice is scored as if it were removed alone.
        lowest_kept: lowest score of a kept index; its distance from ``highest_removed`` is the margin of the choice.
        highest_removed: highest score of a removed index.
    """

    kind: str
    layer: int | None
    size: int
    kept: torch.Tensor
    total: float | None = None
    removed: float | None = None
    lowest_kept: float | None = None
    highest_removed: float | None = None

    def explain(self, scores: torch.Tensor) -> None:
        """Record the part of the scores ``[size]`` that explains the choice."""
        is_removed = torch.ones(self.size, dtype=torch.bool)
        is_removed[self.kept] = False
        removed_scores = scores[torch.isfinite(scores) & is_removed]  # indices removed in an earlier step have none
        if removed_scores.numel():
            self.total = scores[torch.isfinite(scores)].sum().item()
            self.removed, self.highest_removed = removed_scores.sum().item(), removed_scores.max().item()
            lowest = scores[self.kept].min().item()
            self.lowest_kept = lowest if isfinite(lowest) else None  # indices that must stay score infinity

    @property
    def margin(self) -> float | None:
        """Distance of the highest removed score below the lowest kept score, as a share of the latter.

        >>> choice = Choice("neurons", 0, 4, torch.tensor([0, 3]))
        >>> choice.explain(torch.tensor([4.0, 1.0, 3.0, 8.0]))
        >>> choice.margin, removed_share([choice])
        (0.25, 0.25)
        """
        if self.lowest_kept is None or self.highest_removed is None or not self.lowest_kept:
            return None
        return (self.lowest_kept - self.highest_removed) / abs(self.lowest_kept)


def removed_share(choices: Iterable[Choice]) -> float | None:
    """Return the share of the summed score of units that their plan removes; None if scores are unknown.

    Scores with both signs have no such share, nor have plans of versions that did not record the total.
    """
    choices = list(choices)
    sums = [(c.removed, c.total) for c in choices if c.removed is not None and c.total is not None]
    removed, total = sum(r for r, _ in sums), sum(t for _, t in sums)
    return removed / total if sums and len(sums) == len(choices) and 0 <= removed <= total and total else None


@dataclass(repr=False)
class PruningPlan:
    """The indices of a model's units that stay, and the parameter positions that they occupy.

    Attributes:
        kept: ``{parameter: {dim: sorted LongTensor of kept positions}}`` for every pruned parameter.
        units: the choice for every unit that loses indices, by unit name.
        shapes: shape of every pruned parameter before pruning; a plan fits only a model with these shapes.
        settings: record of the arguments that made the plan.
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
        """Kept layers by the path of their stack, for stacks that lose layers."""
        return {name.rpartition(".")[0]: c.kept for name, c in self.units.items() if c.kind == "layers"}

    @property
    def vocabulary(self) -> Choice | None:
        """The choice of tokens; None if the vocabulary is not pruned."""
        return next((c for c in self.units.values() if c.kind == "vocabulary"), None)

    @property
    def tokens(self) -> list[int] | None:
        """Kept token ids, in the order of their new ids; None if the vocabulary is not pruned."""
        return self.vocabulary.kept.tolist() if self.vocabulary else None

    @property
    def key(self) -> list[Any]:
        """Values of JSON that tell plans apart by what they leave."""
        return [{name: to_ranges(choice.kept) for name, choice in self.units.items()}, self.blocks]

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
        """Return the shape after pruning of a tensor that has the shape ``shape`` before."""
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
        except (IndexError, OverflowError, ValueError) as error:
            raise PrunerError(f"the plan {path} is damaged: {error}") from error

    @classmethod
    def _from_document(cls, document: PlanDocument) -> PruningPlan:
        plan = cls(settings=document.settings, notes=document.notes, weights=document.weights, blocks=document.blocks)
        positions = list(all_from_ranges(document.positions))
        for name, parameter in document.parameters.items():
            plan.shapes[name] = tuple(parameter.shape)
            plan.kept[name] = {int(dim): positions[place] for dim, place in parameter.kept.items()}
            for dim, kept in plan.kept[name].items():
                if kept.numel() and int(kept[-1]) >= plan.shapes[name][dim]:
                    raise ValueError(f"{name} keeps position {int(kept[-1])} of {plan.shapes[name][dim]}")
        chosen = all_from_ranges(unit.kept for unit in document.units.values())
        for (name, unit), kept in zip(document.units.items(), chosen, strict=True):
            if not kept.numel() or int(kept[-1]) >= unit.size:
                raise ValueError(f"{name} keeps no index or one outside its {unit.size}")
            explanation = {key: getattr(unit, key) for key in EXPLANATION}
            plan.units[name] = Choice(unit.kind, unit.layer, unit.size, kept, **explanation)
        layers = [layer for unit in plan.units.values() for layer in (unit.layer, unit.size * (unit.kind == "layers"))]
        if max((layer or 0 for layer in (*layers, *map(layer_in, plan.blocks))), default=0) > MOST_LAYERS:
            raise ValueError(f"it has more than {MOST_LAYERS:,} layers")
        return plan

    def summary(self) -> str:
        """Describe the plan in one line per kind of unit, with its notes."""
        lines = []
        for kind in dict.fromkeys(c.kind for c in self.units.values()):
            chosen = [c for c in self.units.values() if c.kind == kind]
            kept, total = sum(c.kept.numel() for c in chosen), sum(c.size for c in chosen)
            lines.append(f"{kind}: {kept} of {total} kept in {len(chosen)} unit{'s' * (len(chosen) > 1)}")
        if self.blocks:
            lines.append(f"removed: {', '.join(self.blocks)}")
        return "\n".join([*lines, *self.notes])

    @property
    def removed_parameters(self) -> int:
        """Number of parameters that the plan removes."""
        return sum(prod(shape) - prod(self.cut_shape(name, shape)) for name, shape in self.shapes.items())

    def table(self) -> Cells:
        """Return a table of the units that lose indices, with a row per kind; the first row is the head."""
        cells = [["kind", "units", "kept", "share kept", "score removed"]]
        for kind in dict.fromkeys(c.kind for c in self.units.values()):
            chosen = [c for c in self.units.values() if c.kind == kind]
            kept, total = sum(c.kept.numel() for c in chosen), sum(c.size for c in chosen)
            counts = f"{len(chosen):,}", f"{kept:,} of {total:,}", percent(kept / total)
            cells.append([kind, *counts, percent(removed_share(chosen))])
        return cells

    def title(self) -> str:
        """Return the first line of the representations."""
        base = f" of {self.settings['base_model']}" if "base_model" in self.settings else ""
        return f"PruningPlan{base}: removes {amount(self.removed_parameters)} parameters"

    def __repr__(self) -> str:
        kinds = [f"{kept} {kind} kept in {units} units" for kind, units, kept, *_ in self.table()[1:]]
        return "\n  ".join([self.title(), *kinds, *(f"{path} removed" for path in self.blocks)])

    def _repr_html_(self) -> str:
        return html_table(self.title(), self.table(), [*(f"{path} removed" for path in self.blocks), *self.notes])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the share of the indices that each layer keeps, by kind of unit; a removed layer or block keeps none.

        Raises:
            PrunerError: the plan removes nothing, or matplotlib is not installed.
        """
        return plot_shares(self.kept_by_layer(), title=self.title(), label="share kept", highest=1.0, ax=ax)

    def kept_by_layer(self) -> dict[str, dict[int | None, float]]:
        """Return the share of the indices that stays, by kind and layer, up to the last layer that loses any.

        Layers without a choice keep everything. Units of the whole model have the layer None.
        """
        sizes, kept = self._parts()
        rows = by_layer(kept)
        for kind, row in by_layer(sizes).items():
            rows[kind] = {layer: rows[kind][layer] / size for layer, size in row.items()}
        last = max((layer for row in rows.values() for layer in row if layer is not None), default=-1)
        for kind, row in rows.items():
            removed = rows.get(kind.replace(kind.partition(", ")[0], "layers"), {})
            for layer in range(last + 1) if set(row) != {None} else ():
                row.setdefault(layer, removed.get(layer, 1.0))
        return rows

    def _parts(self) -> tuple[list[Part], list[Part]]:
        """Return sizes and kept counts of units, of layers and of removed blocks, each with its layer."""
        sizes: list[Part] = [(path, layer_in(path), 1.0) for path in self.blocks]
        kept: list[Part] = [(path, layer, 0.0) for path, layer, _ in sizes]
        for name, choice in self.units.items():
            if choice.kind == "layers":
                stays = set(choice.kept.tolist())
                sizes += [(name, i, 1.0) for i in range(choice.size)]
                kept += [(name, i, float(i in stays)) for i in range(choice.size)]
            else:
                sizes.append((name, choice.layer, choice.size))
                kept.append((name, choice.layer, choice.kept.numel()))
        return sizes, kept


def name_after(name: str, plan: PruningPlan) -> str | None:
    """Return the name of a tensor after layers and blocks are removed; None for a tensor of these."""
    if any(name.startswith(f"{path}.") for path in plan.blocks):
        return None
    for path, kept in plan.layers.items():
        if match := re.match(rf"({re.escape(path)}\.)(\d+)(\..*)", name):
            index = (kept == int(match[2])).nonzero().flatten()
            return f"{match[1]}{int(index)}{match[3]}" if index.numel() else None
    return name

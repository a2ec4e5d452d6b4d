"""The pruning plan: what stays, as data.

A plan names, for every parameter that it touches, which positions of which dims are kept. It needs neither
the model nor the graph to be read, printed, put under version control or applied elsewhere.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import jsonschema
import torch

from ..errors import PrunerError
from ..files import read_json, write_text
from ..graph.units import Unit

FORMAT, VERSION = "llm-pruner plan", 1
WHY = ("removed", "lowest_kept", "highest_removed")
Kept = dict[str, dict[int, torch.Tensor]]
LONGEST = 2**26  # positions of one dim; more is no plan
_COUNT = {"type": "integer", "minimum": 0}
_TEXTS = {"type": "array", "items": {"type": "string"}}
_PARAMETER = {
    "type": "object",
    "properties": {
        "shape": {"type": "array", "items": _COUNT},
        "kept": {"type": "object", "propertyNames": {"pattern": "^[0-9]{1,3}$"}, "additionalProperties": _COUNT},
    },
    "required": ["shape", "kept"],
}
_UNIT = {
    "type": "object",
    "properties": {
        "kind": {"type": "string"},
        "layer": {"type": ["integer", "null"]},
        "size": _COUNT,
        "kept": {"type": "string"},
        **{key: {"type": "number"} for key in WHY},
    },
    "required": ["kind", "layer", "size", "kept"],
}
SCHEMA = {
    "type": "object",
    "properties": {
        "settings": {"type": "object"},
        "notes": _TEXTS,
        "weights": {"type": "object", "additionalProperties": {"type": "string"}},
        "blocks": _TEXTS,
        "positions": _TEXTS,
        "parameters": {"type": "object", "additionalProperties": _PARAMETER},
        "units": {"type": "object", "additionalProperties": _UNIT},
    },
    "required": ["settings", "notes", "positions", "parameters", "units"],
}


@dataclass
class Choice:
    """What happens to one unit, and why.

    Attributes:
        kept: sorted LongTensor of the indices (of ``size``) that stay.
        removed: what the indices that go score together. With a Taylor criterion that is the change of the calibration
            loss that it predicts, every slice counted as if it went alone.
        lowest_kept: the lowest score of what stays; its distance from ``highest_removed`` is the margin of the cut.
    """

    kind: str
    layer: int | None
    size: int
    kept: torch.Tensor
    removed: float | None = None
    lowest_kept: float | None = None
    highest_removed: float | None = None

    def explain(self, scores: torch.Tensor) -> None:
        """Note what the scores ``[size]`` say of the cut."""
        gone = torch.ones(self.size, dtype=torch.bool)
        gone[self.kept] = False
        known = scores[torch.isfinite(scores) & gone]  # what went in an earlier step has no score of this one
        if known.numel():
            self.removed, self.highest_removed = known.sum().item(), known.max().item()
            lowest = scores[self.kept].min().item()
            self.lowest_kept = lowest if isfinite(lowest) else None  # what must stay has no score of its own


@dataclass
class PruningPlan:
    """What stays of a model.

    Attributes:
        kept: ``{parameter: {dim: sorted LongTensor of kept positions}}`` for every parameter that is touched.
        units: the choice for every unit that loses something, by unit name.
        shapes: shape of every touched parameter before pruning; a plan fits only a model that has them.
        settings: how the plan was made, for the record.
        notes: what the reader should know, such as units too small to lose anything.
        weights: SHA-256 of the files that hold what it left, by name; empty unless it lies with a checkpoint.
        blocks: paths of modules that are gone altogether, such as the attention of a layer.
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
        """Kept layers by path of their stack, for the stacks that lose some."""
        return {name.rpartition(".")[0]: c.kept for name, c in self.units.items() if c.kind == "layers"}

    @property
    def tokens(self) -> list[int] | None:
        """The ids of the tokens that stay, in order: their places are the new ids. None if all do."""
        return next((c.kept.tolist() for c in self.units.values() if c.kind == "vocabulary"), None)

    def keep(self, unit: Unit, indices: torch.Tensor, shapes: dict[str, tuple[int, ...]]) -> None:
        """Keep only ``indices`` of a unit. Several units may cut the same parameter dim."""
        indices = indices.unique()
        if not indices.numel() or int(indices[0]) < 0 or int(indices[-1]) >= unit.size:
            raise PrunerError(f"{unit.name} must keep at least one of its indices 0 to {unit.size - 1}")
        self.units[unit.name] = Choice(unit.kind, unit.layer, unit.size, indices)
        stays = torch.zeros(unit.size + 1, dtype=torch.bool)
        stays[indices], stays[-1] = True, True  # the last is for -1: positions that the unit does not reach
        found: dict[int, torch.Tensor] = {}  # dims of one form share their labels
        for (name, dim), label in unit.dims.items():
            if id(label) not in found:
                found[id(label)] = stays[label].nonzero().flatten()
            positions = found[id(label)]
            if len(positions) == len(label):
                continue
            before = self.kept.setdefault(name, {}).get(dim)
            if before is not None:
                positions = before[torch.isin(before, positions)]
            self.kept[name][dim] = positions
            self.shapes[name] = tuple(shapes[name])

    def drop_block(self, path: str, shapes: dict[str, tuple[int, ...]]) -> None:
        """Keep nothing of a module: it adds nothing to the stream any more."""
        self.blocks.append(path)
        for name, shape in shapes.items():
            if name.startswith(f"{path}."):
                self.kept[name] = {0: torch.tensor([], dtype=torch.long)}
                self.shapes[name] = tuple(shape)

    def cut_shape(self, name: str, shape: Iterable[int]) -> tuple[int, ...]:
        """The shape of a tensor after the plan."""
        kept = self.kept.get(name, {})
        return tuple(len(kept[dim]) if dim in kept else size for dim, size in enumerate(shape))

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON. Position lists shared by several parameters are written once."""
        sets: dict[str, int] = {}
        parameters = {}
        for name in sorted(self.kept):
            kept = {str(d): sets.setdefault(_ranges(k), len(sets)) for d, k in sorted(self.kept[name].items())}
            parameters[name] = {"shape": list(self.shapes[name]), "kept": kept}
        document: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "settings": self.settings,
            "notes": self.notes,
            "units": {
                name: {"kind": c.kind, "layer": c.layer, "size": c.size, "kept": _ranges(c.kept)}
                | {key: getattr(c, key) for key in WHY if getattr(c, key) is not None}
                for name, c in self.units.items()
            },
            "positions": list(sets),
            "parameters": parameters,
        }
        if self.weights:
            document["weights"] = self.weights
        if self.blocks:
            document["blocks"] = self.blocks
        document["sha256"] = _digest(document)
        write_text(Path(path), json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path, verify: bool = False) -> PruningPlan:
        """Read a plan written by :meth:`save`.

        Args:
            verify: refuse a plan that was changed since.

        Raises:
            PrunerError: the file is missing, no plan, or names positions outside the shapes it states.
        """
        document = read_json(path)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise PrunerError(f"{path} is not a pruning plan (no format {FORMAT!r})")
        if document.get("version") != VERSION:
            raise PrunerError(f"{path} has plan version {document.get('version')}; this program reads {VERSION}")
        stated = document.pop("sha256", None)
        if verify and stated != _digest(document):
            raise PrunerError(f"the plan {path} was changed after it was written: its hash does not fit its contents")
        wrong = next(jsonschema.Draft202012Validator(SCHEMA).iter_errors(document), None)
        if wrong is not None:
            raise PrunerError(f"the plan {path} is damaged: {wrong.json_path} {' '.join(wrong.message.split())[:200]}")
        try:
            plan = cls(settings=document["settings"], notes=document["notes"])
            plan.weights, plan.blocks = document.get("weights", {}), document.get("blocks", [])
            sets = [_positions(text) for text in document["positions"]]
            for name, entry in document["parameters"].items():
                plan.shapes[name] = tuple(entry["shape"])
                plan.kept[name] = {int(dim): sets[i] for dim, i in entry["kept"].items()}
            for name, entry in document["units"].items():
                kept = _positions(entry["kept"])
                why = {key: float(entry[key]) for key in WHY if key in entry}
                plan.units[name] = Choice(entry["kind"], entry["layer"], entry["size"], kept, **why)
                if not kept.numel() or int(kept[-1]) >= entry["size"]:
                    raise ValueError(f"{name} keeps no index or one outside its {entry['size']}")
            for name, dims in plan.kept.items():
                for dim, kept in dims.items():
                    if kept.numel() and int(kept[-1]) >= plan.shapes[name][dim]:
                        raise ValueError(f"{name} keeps position {int(kept[-1])} of {plan.shapes[name][dim]}")
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise PrunerError(f"the plan {path} is damaged: {error}") from error
        return plan

    def summary(self) -> str:
        """One line a kind: how many units lose how much."""
        lines = []
        for kind in dict.fromkeys(c.kind for c in self.units.values()):
            chosen = [c for c in self.units.values() if c.kind == kind]
            kept, total = sum(c.kept.numel() for c in chosen), sum(c.size for c in chosen)
            lines.append(f"{kind}: {kept} of {total} kept in {len(chosen)} unit{'s' * (len(chosen) > 1)}")
        if self.blocks:
            lines.append(f"gone: {', '.join(self.blocks)}")
        return "\n".join([*lines, *self.notes])


def _digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _ranges(positions: torch.Tensor) -> str:
    """``[0, 1, 2, 7]`` as ``"0-2,7"``."""
    out: list[str] = []
    values: Iterable[int] = positions.tolist()
    start = last = None
    for value in [*values, None]:
        if last is not None and value == last + 1:
            last = value
            continue
        if last is not None:
            out.append(f"{start}" if start == last else f"{start}-{last}")
        start = last = value
    return ",".join(out)


def _positions(text: str) -> torch.Tensor:
    values: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        begin, end = int(first), int(last or first) + 1
        if not 0 < end - begin <= LONGEST or end > 2**31:
            raise ValueError(f"the range {part[:60]} is empty or too long")
        values.extend(range(begin, end))
    if any(b <= a for a, b in itertools.pairwise(values)) or (values and values[0] < 0):
        raise ValueError(f"positions out of order: {text[:60]}")
    return torch.tensor(values, dtype=torch.long)


def name_after(name: str, plan: PruningPlan) -> str | None:
    """The name of a tensor after layers and blocks are dropped; None when it lies in one of these."""
    if any(name.startswith(f"{path}.") for path in plan.blocks):
        return None
    for path, kept in plan.layers.items():
        if match := re.match(rf"({re.escape(path)}\.)(\d+)(\..*)", name):
            index = (kept == int(match[2])).nonzero().flatten()
            return f"{match[1]}{int(index)}{match[3]}" if index.numel() else None
    return name

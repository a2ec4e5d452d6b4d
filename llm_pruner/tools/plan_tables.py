"""Show a pruning plan: kept indices by kind and layer, the removed share of the score, and the run's measurements."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..display import Cells, percent
from ..files import read_json
from ..pruning.measurements import METRICS_FILE, before_and_after
from ..selection.plan import Choice, PruningPlan, removed_share
from ..selection.plan_file import to_ranges
from .tables import print_table, print_text

SETTINGS = ("criterion", "taylor", "aggregation", "ratio", "target_params", "scope", "layers_kept", "calibration")
EXPLANATION = (
    "score removed: the removed indices' share of the summed score of these units",
    "margin: how far the highest removed score is below the lowest kept one",
)


def print_plan(console: Console, plan: PruningPlan, shown: Callable[[int | None], bool] | None = None) -> None:
    """Print a plan.

    Args:
        shown: returns True for layers to show unit by unit; None shows all, layers that keep the same count in one row.
    """
    print_table(console, "\n".join([plan.title(), *_settings(plan)]), plan.table())
    cells = _unit_cells(plan, shown)
    if len(cells) > 1:
        print_table(console, "units that lose indices", cells)
    for line in [*(EXPLANATION if "margin" in cells[0] else ()), *_removed_parts(plan), *plan.notes]:
        print_text(console, line)
    console.print()


def print_measurements(console: Console, folder: Path) -> bool:
    """Print the measurements of a run before and after pruning; return False if its folder has none."""
    metrics = read_json(folder / METRICS_FILE) if (folder / METRICS_FILE).is_file() else None
    try:
        cells = before_and_after(metrics) if metrics else []
    except (KeyError, TypeError, ValueError):  # the record of another program
        cells = []
    if cells:
        print_table(console, "measured by the run", cells)
    return bool(cells)


def plan_document(plan: PruningPlan) -> dict[str, Any]:
    """Return the kept counts of each unit as a JSON document, with the scores that explain them as shares."""
    units = {
        name: {
            "kind": choice.kind,
            "layer": choice.layer,
            "size": choice.size,
            "kept": choice.kept.numel(),
            "score_removed": removed_share([choice]),
            "margin": choice.margin,
        }
        for name, choice in plan.units.items()
    }
    return {"units": units, "removed_blocks": plan.blocks, "removed_parameters": plan.removed_parameters}


def _settings(plan: PruningPlan) -> list[str]:
    """Return the settings that made a plan in one line; none for a plan without any."""
    values = {name: plan.settings[name] for name in SETTINGS if plan.settings.get(name) is not None}
    texts = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()]
    return [", ".join(texts)] if texts else []


def _removed_parts(plan: PruningPlan) -> list[str]:
    """Say which layers and blocks are removed."""
    lines = [f"removed: {path}" for path in plan.blocks]
    for name, choice in plan.units.items():
        if choice.kind == "layers":
            is_removed = torch.ones(choice.size, dtype=torch.bool)
            is_removed[choice.kept] = False
            lines.append(f"removed from {name.rpartition('.')[0]}: {to_ranges(is_removed.nonzero().flatten())}")
    return lines


def _unit_cells(plan: PruningPlan, shown: Callable[[int | None], bool] | None) -> Cells:
    """Return the rows of units; without a choice of layers, those that keep the same count in one row."""
    if shown is not None:
        groups = [[(name, choice)] for name, choice in plan.units.items() if shown(choice.layer)]
    else:
        groups = _same_counts(plan.units.items())
    head, rows = ["unit", "layers", "kept", "score removed", "margin"], []
    for group in groups:
        choices = [choice for _, choice in group]
        layers = [choice.layer for choice in choices if choice.layer is not None]
        margins = [choice.margin for choice in choices if choice.margin is not None]
        kept, size = choices[0].kept.numel(), choices[0].size
        row = [_pattern(group[0][0]) if layers else group[0][0], to_ranges(torch.tensor(layers)).replace(",", ", ")]
        row += [f"{kept:,} of {size:,} ({percent(kept / size)})", percent(removed_share(choices))]
        rows.append([*row, percent(min(margins, default=None))])
    if all(row[3:] == ["-", "-"] for row in rows):
        return [line[:3] for line in [head, *rows]]
    return [head, *rows]


def _same_counts(units: Iterable[tuple[str, Choice]]) -> list[list[tuple[str, Choice]]]:
    """Group units of neighbouring layers that have the same place in their layer and keep the same count."""
    ordered = sorted(units, key=lambda unit: (_pattern(unit[0]), unit[1].layer or 0))
    offsets = {name: (choice.layer or 0) - i for i, (name, choice) in enumerate(ordered)}
    groups = groupby(ordered, lambda unit: (_pattern(unit[0]), unit[1].kept.numel(), unit[1].size, offsets[unit[0]]))
    return [list(group) for _, group in groups]


def _pattern(name: str) -> str:
    """Return a unit's name with a star for the layer.

    >>> _pattern("model.layers.3.mlp.neurons")
    'model.layers.*.mlp.neurons'
    """
    return re.sub(r"\.\d+\.", ".*.", name, count=1)

"""``llm-pruner inspect``: what can be pruned in a model, what cannot, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from ..checkpoint.config import load_config, meta_model
from ..checkpoint.load import load
from ..errors import PrunerError
from ..files import read_json
from ..graph.permutation import PermutationReport, verify_units
from ..graph.tracer import TraceError
from ..graph.units import CouplingGraph, Unit, trace
from ..selection.plan import FORMAT, PruningPlan
from .arguments import InspectArguments


def run_inspect(args: InspectArguments) -> None:
    """Print a plan, or the units of a model; its weights are read only with ``--verify``."""
    if is_plan(Path(args.model)):
        plan = PruningPlan.load(args.model)
        print(Path(args.model).read_text(encoding="utf-8")) if args.json else _print_plan(plan, args)
        return
    reports: list[PermutationReport] = []
    if args.verify:
        model, _ = load(args.model, "float32", "cpu", args.trust_remote_code)
        graph = trace(model)
        reports = verify_units(model, graph)
    else:
        try:
            graph = trace(meta_model(load_config(args.model, args.trust_remote_code), args.trust_remote_code))
        except TraceError as error:
            raise PrunerError(f"{error}: add --verify, which reads them") from error
    if args.json:
        print(json.dumps(as_json(graph, reports), indent=1))
        return
    _print(graph, args, reports)


def is_plan(path: Path) -> bool:
    """Whether a file says of itself that it is a pruning plan."""
    if path.suffix != ".json" or not path.is_file():
        return False
    found = read_json(path)
    return isinstance(found, dict) and found.get("format") == FORMAT


def _print_plan(plan: PruningPlan, args: InspectArguments) -> None:
    console = Console(soft_wrap=False)
    shown = {n: c for n, c in plan.units.items() if args.layer in (None, -1) or c.layer in (None, args.layer)}
    shown = shown or plan.units  # a plan that leaves the layer alone is shown whole
    columns = _columns("unit", "kept", "score removed", "highest removed", "lowest kept", "margin")
    table = Table(*columns, title=f"plan: {_settings(plan)}")
    for name, choice in shown.items():
        low, high = choice.lowest_kept, choice.highest_removed
        margin = None if low is None or high is None else low - high
        numbers = ["-" if value is None else f"{value:.3g}" for value in (choice.removed, high, low, margin)]
        table.add_row(name, f"{choice.kept.numel()} of {choice.size}", *numbers)
    console.print(table)
    for line in plan.summary().splitlines():
        console.print(line)
    removed = [c.removed for c in plan.units.values() if c.removed is not None]
    if removed and plan.settings.get("criterion") == "taylor":
        console.print(f"predicted change of the calibration loss, slice by slice: {sum(removed):.4g}")
    if len(shown) < len(plan.units):
        console.print(f"(shown: layer {args.layer} and what spans layers; --layer -1 shows all)")


def _settings(plan: PruningPlan) -> str:
    names = ("criterion", "taylor", "aggregation", "ratio", "target_params", "scope", "layers_kept")
    return ", ".join(f"{name} {plan.settings[name]}" for name in names if name in plan.settings)


def as_json(graph: CouplingGraph, reports: list[PermutationReport]) -> dict[str, Any]:
    checked = {r.unit.name: r.difference for r in reports}

    def row(unit: Unit) -> dict[str, Any]:
        return {
            "name": unit.name,
            "kind": unit.kind,
            "layer": unit.layer,
            "size": unit.size,
            "flags": sorted(unit.flags),
            "parameters": unit.parameters,
            **({"frozen": unit.frozen} if unit.frozen else {}),
            **({"permutation_difference": checked[unit.name]} if unit.name in checked else {}),
        }

    return {
        "units": [row(u) for u in graph.units],
        "frozen": [row(u) for u in graph.frozen],
        "unknown_operators": graph.unknown_operators,
    }


def _print(graph: CouplingGraph, args: InspectArguments, reports: list[PermutationReport]) -> None:
    console = Console(soft_wrap=False)
    wanted = [u for u in graph.units if args.layer in (None, -1) or u.layer in (None, args.layer)]
    table = Table(*_columns("unit", "kind", "size", "flags", "parameter[dim]"), title="prunable units")
    for unit in wanted:
        table.add_row(unit.name, unit.kind, str(unit.size), " ".join(sorted(unit.flags)), _parameters(unit))
    console.print(table)
    frozen = [
        u for u in graph.frozen if len(u.dims) > 1 and (args.layer in (None, -1) or u.layer in (None, args.layer))
    ]
    if frozen:
        table = Table(*_columns("axis", "size", "why", "parameter[dim]"), title="frozen axes")
        for unit in frozen:
            table.add_row(unit.name, str(unit.size), unit.frozen or "", _parameters(unit))
        console.print(table)
    kinds: dict[str, int] = {}
    for unit in graph.units:
        kinds[unit.kind] = kinds.get(unit.kind, 0) + 1
    console.print(f"{len(graph.units)} units: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
    if len(wanted) < len(graph.units):
        console.print(f"(shown: layer {args.layer} and what spans layers; --layer -1 shows all)")
    for name, where in graph.unknown_operators.items():
        console.print(f"no rule for operator {name} (first used in {where}): every axis that enters it is frozen")
    if reports:
        failed = [r for r in reports if not r.passed]
        console.print(f"permutation test: {len(reports) - len(failed)} of {len(reports)} units pass")
        for report in failed:
            console.print(f"  {report.unit.name}: {report.unit.frozen}")


def _columns(*names: str) -> list[Column]:
    return [Column(name, overflow="fold", no_wrap=name in ("kind", "size", "flags")) for name in names]


def _parameters(unit: Unit) -> str:
    """The unit's parameter dims, without the path that its own name says already."""
    path = unit.name.rpartition(f".{unit.kind}")[0]
    names = [f"{name.removeprefix(f'{path}.')}[{dim}]" for name, dim in unit.dims]
    return "\n".join(names if len(names) <= 8 else [*names[:4], f"... and {len(names) - 4} more"])

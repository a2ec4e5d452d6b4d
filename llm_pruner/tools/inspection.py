"""``llm-pruner inspect``: show the prunable units of a model and its frozen axes with the reasons, or a plan."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from ..checkpoint.config import load_config, meta_model
from ..checkpoint.load import load
from ..errors import PrunerError
from ..evaluation.table import strict_json
from ..files import read_json
from ..graph.permutation import PermutationReport, verify_units
from ..graph.tracer import TraceError
from ..graph.units import CouplingGraph, Unit, trace
from ..selection.plan import FORMAT, PruningPlan
from .arguments import InspectArguments

LAYER_NOTE = "(shown: layer {} and units that span layers; --layer -1 shows all)"


def run_inspect(args: InspectArguments) -> None:
    """Print a plan, or the units of a model, whose weights are read only with ``--verify``.

    Raises:
        PrunerError: the model or plan cannot be read, or with ``--verify``, the plan was changed.
    """
    if is_plan(Path(args.model)):
        _inspect_plan(args)
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
        print(strict_json(as_json(graph, reports)), end="")
    else:
        _print_graph(graph, args.layer, reports)


def is_plan(path: Path) -> bool:
    """Return True for a JSON file that has the format of a pruning plan."""
    if path.suffix != ".json" or not path.is_file():
        return False
    document = read_json(path)
    return isinstance(document, dict) and document.get("format") == FORMAT


def _inspect_plan(args: InspectArguments) -> None:
    plan = PruningPlan.load(args.model, verify=args.verify)
    if args.json:
        print(Path(args.model).read_text(encoding="utf-8"))
        return
    _print_plan(plan, args.layer)
    if args.verify:
        print("the plan was checked: its hash fits its contents")


def _is_shown(unit_layer: int | None, layer: int | None) -> bool:
    """Return True for units of the layer asked for and units that span layers; -1 asks for all layers."""
    return layer in (None, -1) or unit_layer in (None, layer)


def _print_plan(plan: PruningPlan, layer: int | None) -> None:
    console = Console(soft_wrap=False)
    shown = {name: choice for name, choice in plan.units.items() if _is_shown(choice.layer, layer)}
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
        console.print(LAYER_NOTE.format(layer))


def _settings(plan: PruningPlan) -> str:
    names = ("criterion", "taylor", "aggregation", "ratio", "target_params", "scope", "layers_kept")
    return ", ".join(f"{name} {plan.settings[name]}" for name in names if name in plan.settings)


def as_json(graph: CouplingGraph, reports: list[PermutationReport]) -> dict[str, Any]:
    """Return units and frozen axes as a JSON document, with the differences that the permutation test measured."""
    differences = {report.unit.name: report.difference for report in reports}

    def describe(unit: Unit) -> dict[str, Any]:
        document: dict[str, Any] = {
            "name": unit.name,
            "kind": unit.kind,
            "layer": unit.layer,
            "size": unit.size,
            "flags": sorted(unit.flags),
            "parameters": unit.parameters,
        }
        if unit.frozen:
            document["frozen"] = unit.frozen
        if unit.name in differences:
            document["permutation_difference"] = differences[unit.name]
        return document

    return {
        "units": [describe(unit) for unit in graph.units],
        "frozen": [describe(unit) for unit in graph.frozen],
        "unknown_operators": graph.unknown_operators,
    }


def _print_graph(graph: CouplingGraph, layer: int | None, reports: list[PermutationReport]) -> None:
    console = Console(soft_wrap=False)
    units = [unit for unit in graph.units if _is_shown(unit.layer, layer)]
    table = Table(*_columns("unit", "kind", "size", "flags", "parameter[dim]"), title="prunable units")
    for unit in units:
        table.add_row(unit.name, unit.kind, str(unit.size), " ".join(sorted(unit.flags)), _parameters(unit))
    console.print(table)
    frozen = [unit for unit in graph.frozen if len(unit.dims) > 1 and _is_shown(unit.layer, layer)]
    if frozen:
        table = Table(*_columns("axis", "size", "why", "parameter[dim]"), title="frozen axes")
        for unit in frozen:
            table.add_row(unit.name, str(unit.size), unit.frozen or "", _parameters(unit))
        console.print(table)
    console.print(f"{len(graph.units)} units: {_count_kinds(graph.units)}")
    if len(units) < len(graph.units):
        console.print(LAYER_NOTE.format(layer))
    for name, where in graph.unknown_operators.items():
        console.print(f"no rule for operator {name} (first used in {where}): every axis that enters it is frozen")
    if reports:
        for line in permutation_summary(graph, reports):
            console.print(line)


def permutation_summary(graph: CouplingGraph, reports: list[PermutationReport]) -> list[str]:
    """Summarise the permutation test in lines; units that passed and units not tested are those of the graph."""
    failed = [report for report in reports if not report.passed]
    tested = {report.unit.name for report in reports}
    untested = [unit for unit in graph.units if unit.name not in tested]
    passed = f"permutation test: {len(reports) - len(failed)} of {len(reports)} tested units pass"
    lines = [f"{passed}, {len(failed)} are frozen by the test" if failed else passed]
    if untested:
        lines.append(f"not tested, since the order of their indices matters: {_count_kinds(untested)}")
    return lines + [f"  {report.unit.name}: {report.unit.frozen}" for report in failed]


def _count_kinds(units: list[Unit]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in Counter(unit.kind for unit in units).items())


def _columns(*names: str) -> list[Column]:
    return [Column(name, overflow="fold", no_wrap=name in ("kind", "size", "flags")) for name in names]


def _parameters(unit: Unit) -> str:
    """List the unit's parameter dims, without the path that its own name begins with."""
    path = unit.name.rpartition(f".{unit.kind}")[0]
    names = [f"{name.removeprefix(f'{path}.')}[{dim}]" for name, dim in unit.dims]
    return "\n".join(names if len(names) <= 8 else [*names[:4], f"... and {len(names) - 4} more"])

"""``llm-pruner inspect``: show the prunable units and frozen axes of a model, and the effect of a plan."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from ..checkpoint.config import load_config, meta_model
from ..checkpoint.load import load
from ..checkpoint.locate import PLAN_FILE
from ..errors import PrunerError
from ..evaluation.cost import macs
from ..evaluation.evaluate import DEFAULT_TOKENS
from ..evaluation.speed import tokens_read
from ..evaluation.tabular import short_number
from ..files import read_json, strict_json
from ..graph.permutation import PermutationReport, verify_units
from ..graph.tracer import TraceError, UnknownInputs
from ..graph.units import CouplingGraph, Unit
from ..models.inputs import has_remembered_inputs, reads_text_only
from ..models.skeleton import parameter_count
from ..pruning.towers import LANGUAGE, trace_towers
from ..selection.plan import FORMAT, PruningPlan
from .arguments import InspectArguments
from .plan_tables import plan_document, print_measurements, print_plan
from .super_experts import find_on_text, print_super_experts
from .tables import print_table, print_text

SHOWN_DIMS = 12  # of a unit; the others are counted
FREE, FROZEN = "prunable units", "frozen axes"


def run_inspect(args: InspectArguments) -> None:
    """Print a plan, or the units of a model and its own plan, if any.

    Weights are read only with ``--verify`` or ``--super_experts``.

    Raises:
        PrunerError: the model or plan cannot be read, it has no layer ``--layer``, or with ``--verify``, the plan was
            changed.
    """
    if is_plan(Path(args.model)):
        _inspect_plan(args)
        return
    plan_file = Path(args.model) / PLAN_FILE
    plan = PruningPlan.load(plan_file, verify=args.verify) if plan_file.is_file() else None
    reports: list[PermutationReport] = []
    super_experts: dict[str, list[int]] | None = None
    model: Any
    if args.verify or args.super_experts is not None:
        if Path(args.model).is_file() and Path(args.model).suffix == ".json":
            raise PrunerError(f"{args.model} is a config alone, without weights to read: give the model's folder")
        model, tokenizer = load(args.model, "float32", "cpu", args.trust_remote_code, task=args.task)
        graph = trace_towers(model, args.towers)
        if args.super_experts is not None:
            super_experts = find_on_text(model, tokenizer, graph, args.super_experts)
        reports = verify_units(model, graph) if args.verify else []
    else:
        config = load_config(args.model, args.trust_remote_code, task=args.task)
        model = meta_model(config, args.trust_remote_code)
        try:
            graph = trace_towers(model, args.towers)
        except UnknownInputs:
            raise
        except TraceError as error:
            raise PrunerError(f"{error}: add --verify, which loads the weights") from error
    _check_layer(graph, args.layer)
    parameters, of_sample = parameter_count(model), _macs_of_sample(model)
    if args.json:
        document = as_json(graph, reports) | {"parameters": parameters}
        document |= {"macs": of_sample} if of_sample else {}
        document |= {"super_experts": super_experts} if super_experts is not None else {}
        print(strict_json(document | ({"pruned": plan_document(plan)} if plan else {})), end="")
        return
    console = Console(soft_wrap=False)
    if plan is not None:
        _print_history(console, plan, Path(args.model), parameters)
    _print_graph(console, graph, 0 if args.layer is None else args.layer, reports)
    if super_experts is not None:
        print_super_experts(console, super_experts, args.super_experts)
    if of_sample:
        console.print(f"multiply-accumulates for one image or sound: {short_number(of_sample)}")


def _macs_of_sample(model: Any) -> int | None:
    """Count the multiply-accumulates for one image or sound; None for a text, and where they cannot be counted."""
    if reads_text_only(model) and not has_remembered_inputs(model):
        return None
    try:
        return macs(model, tokens_read(model, DEFAULT_TOKENS))
    except (PrunerError, RuntimeError):  # some operators have no shapes on the meta device
        return None


def _check_layer(graph: CouplingGraph, layer: int | None) -> None:
    last = max((unit.layer for unit in [*graph.units, *graph.frozen] if unit.layer is not None), default=0)
    if layer is not None and not -1 <= layer <= last:
        raise PrunerError(f"--layer {layer} is out of range: give 0 to {last}, or -1 for all")


def is_plan(path: Path) -> bool:
    """Return True for a JSON file that has the format of a pruning plan."""
    if path.suffix != ".json" or not path.is_file():
        return False
    document = read_json(path)
    return isinstance(document, dict) and document.get("format") == FORMAT


def _inspect_plan(args: InspectArguments) -> None:
    for name, value in (("task", args.task), ("towers", args.towers), ("super_experts", args.super_experts)):
        if value not in (None, LANGUAGE):
            raise PrunerError(f"--{name} {value} is for a model, and {args.model} is a plan: leave it out")
    plan = PruningPlan.load(args.model, verify=args.verify)
    if args.json:
        print(Path(args.model).read_text(encoding="utf-8"))
        return
    console, layer = Console(soft_wrap=False), args.layer
    print_plan(console, plan, None if layer is None else lambda of: _is_shown(of, layer))
    print_measurements(console, Path(args.model).parent)
    if args.verify:
        print_text(console, "the plan was checked: its hash fits its contents")


def _print_history(console: Console, plan: PruningPlan, folder: Path, parameters: int) -> None:
    """Print the plan that a model was pruned by, and its size and quality before and after."""
    print_plan(console, plan)
    if not print_measurements(console, folder):
        before = parameters + plan.removed_parameters
        after = f"{parameters:,} ({parameters / before:.1%})"
        print_table(console, "size", [["", "before", "after"], ["parameters", f"{before:,}", after]])
    console.print("Units that can still be pruned:\n", style="bold")


def _is_shown(unit_layer: int | None, layer: int) -> bool:
    """Return True for units of the layer asked for and units that span layers; -1 asks for all layers."""
    return layer == -1 or unit_layer in (None, layer)


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


def _print_graph(console: Console, graph: CouplingGraph, layer: int, reports: list[PermutationReport]) -> None:
    print_table(console, graph.title(), graph.table(), texts=(4,))
    units = [unit for unit in graph.units if _is_shown(unit.layer, layer)]
    which = "" if layer == -1 else f" of layer {layer} and of the whole model"
    cells = [["unit", "size", "flags", "parameters[dim] (layers)"]]
    cells += [[u.name, f"{u.size:,}", " ".join(sorted(u.flags)), _parameters(u)] for u in units]
    print_table(console, FREE + which, cells, texts=(2,), details=3)
    frozen = [unit for unit in graph.frozen if len(unit.dims) > 1 and _is_shown(unit.layer, layer)]
    if frozen:
        cells = [["axis", "size", "why", "parameters[dim] (layers)"]]
        cells += [[unit.name, f"{unit.size:,}", unit.frozen or "", _parameters(unit)] for unit in frozen]
        print_table(console, FROZEN + which, cells, texts=(2,), details=3)
    if len(units) < len(graph.units):
        print_text(console, "--layer N shows another layer, --layer -1 all layers")
    for name, where in graph.unknown_operators.items():
        print_text(console, f"no rule for operator {name} (first used in {where}): every axis that enters it is frozen")
    if reports:
        for line in permutation_summary(graph, reports):
            print_text(console, line)


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


def _parameters(unit: Unit) -> str:
    """List the unit's parameter dims without the path that its own name begins with; dims that differ only by layer
    are one line with their count.

    >>> import torch
    >>> dims = {(f"model.layers.{i}.{name}.weight", 1): torch.arange(4) for i in range(2) for name in ("up", "gate")}
    >>> print(_parameters(Unit("model.hidden", "hidden", None, 4, dims=dims)))
    layers.*.up.weight[1] (2)
    layers.*.gate.weight[1] (2)
    """
    if unit.kind == "layers":
        return "every tensor of a layer"
    path = unit.name.rpartition(f".{unit.kind}")[0]
    names = [f"{name.removeprefix(f'{path}.')}[{dim}]" for name, dim in unit.dims]
    patterns = Counter(re.sub(r"(^|\.)\d+\.", r"\1*.", name, count=1) if unit.layer is None else name for name in names)
    lines = [f"{pattern} ({count})" if count > 1 else pattern for pattern, count in patterns.items()]
    more = len(lines) - SHOWN_DIMS
    return "\n".join([*lines[:SHOWN_DIMS], f"and {more} more"] if more > 0 else lines)

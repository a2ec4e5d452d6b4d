"""One page of all runs: tables and figures in a single file that opens from disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..errors import PrunerError
from ..files import write_text
from ..logs import log
from ..version import __version__
from .arguments import ReportArguments
from .figures import Drawing, pruning, recoveries, tradeoffs
from .runs import MeasuredModel, Run, folders_of, read


def write_report(args: ReportArguments) -> Path:
    """Run ``llm-pruner report``: write the page, print and return its path.

    Raises:
        PrunerError: a folder that is no run, or a page that cannot be written.
    """
    args.check()
    runs = _named([read(folder) for given in args.runs for folder in folders_of(given)])
    points = _distinct([point for run in runs for point in run.points])
    overall = tradeoffs(points)
    healed = recoveries(runs)
    details = [(run, pruning(run, f"run{i}")) for i, run in enumerate(runs)]
    drawings = [*overall, *healed, *(d for _, drawn in details for d in drawn)]
    if args.figures:
        _for_papers(drawings, Path(args.figures))
    environment = Environment(loader=PackageLoader(__name__, "."), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("page.html").render(
        title=args.title,
        version=__version__,
        runs=runs,
        summary=_summary(points),
        overall=overall,
        recoveries=healed,
        details=details,
        svg=lambda drawing: Markup(drawing.svg()),
        zip=zip,
    )
    path = Path(args.output)
    write_text(path, page)
    log.info("report of %d run%s: %s", len(runs), "s" * (len(runs) > 1), path)
    print(path)
    return path


def _named(runs: list[Run]) -> list[Run]:
    """Runs of one name told apart by the folders that they lie in."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = "/".join(run.folder.resolve().parts[-2:])
    return runs


def _distinct(points: list[MeasuredModel]) -> list[MeasuredModel]:
    """Every model once for each way in which it was measured: many runs begin with the same original."""
    out: list[MeasuredModel] = []
    for point in points:
        if point not in out:
            out.append(point)
    return out


def _summary(points: list[MeasuredModel]) -> dict[str, list[tuple[str, float | str]]]:
    """The columns of the table, of those that hold anything: what each cell shows and by what it is sorted."""
    largest = max((p.parameters or 0 for p in points), default=0)
    columns: dict[str, tuple[str, Callable[[MeasuredModel], float | None]]] = {
        "parameters": ("{:,}", lambda p: p.parameters),
        "of the largest": ("{:.3f}", lambda p: p.parameters / largest if p.parameters else None),
        "MACs, billions": ("{:.2f}", lambda p: p.macs / 1e9 if p.macs else None),
        "latency, ms": ("{:.1f}", lambda p: p.latency),
    }
    for text in dict.fromkeys(text for point in points for text in point.perplexity):
        columns[f"perplexity, {text}"] = ("{:.2f}", lambda p, t=text: p.perplexity.get(t))  # type: ignore[misc]
    columns["accuracy"] = ("{:.4f}", lambda p: p.accuracy)
    out: dict[str, list[tuple[str, float | str]]] = {
        "model": [(p.model, p.model) for p in points],
        "stage": [(p.stage, p.stage) for p in points],
    }
    for name, (form, value) in columns.items():
        found = [value(point) for point in points]
        if any(x is not None for x in found):
            out[name] = [("", float("inf")) if x is None else (form.format(x), x) for x in found]
    return out


def _for_papers(drawings: list[Drawing], folder: Path) -> None:
    """Every figure as SVG and PNG."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for drawing in drawings:
            for kind in ("svg", "png"):
                drawing.write(folder / f"{drawing.name}.{kind}", kind, dpi=200)
    except OSError as error:
        raise PrunerError(f"cannot write {folder}: {error.strerror or error}") from error

"""Write one page about runs: tables and figures in a single file that opens from disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..errors import PrunerError
from ..files import digest, place_for_run, write_text
from ..logs import log
from ..version import __version__
from .arguments import DEFAULT_OUTPUT, ReportArguments
from .figures import Drawing, draw_pruning, draw_recoveries, draw_tradeoffs
from .runs import MeasuredModel, Run, folders_of, read

PRINT_DPI = 200
MARK = '<meta name="llm-pruner-report" content="{}">'  # in page.html; tells a page of the same runs from others
Cell = tuple[str, float | str]  # text to show, value to sort by


def write_report(args: ReportArguments) -> Path:
    """Run ``llm-pruner report``: write the page, print and return its path.

    Raises:
        PrunerError: a folder holds no run, --output holds another page, or the page cannot be written.
    """
    args.check()
    mark = digest([args.runs, args.title])
    path = place_for_run(
        Path(args.output).expanduser(),
        lambda file: _other_content(file, mark),
        flag="output",
        named=args.output != DEFAULT_OUTPUT,
    )
    runs = [read(folder) for path in args.runs for folder in folders_of(path)]
    _distinguish_names(runs)
    models = _distinct_models(runs)
    tradeoffs, recoveries = draw_tradeoffs(models), draw_recoveries(runs)
    details = [(run, draw_pruning(run, f"run{i}")) for i, run in enumerate(runs)]
    if args.figures:
        prunings = [drawing for _, drawings in details for drawing in drawings]
        _write_figures([*tradeoffs, *recoveries, *prunings], Path(args.figures))
    environment = Environment(loader=PackageLoader(__name__, "."), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("page.html").render(
        title=args.title,
        version=__version__,
        mark=mark,
        runs=runs,
        summary=_summarize(models),
        overall=tradeoffs,
        recoveries=recoveries,
        details=details,
        svg=lambda drawing: Markup(drawing.svg()),
        zip=zip,
    )
    write_text(path, page)
    log.info("report of %d run%s: %s", len(runs), "s" * (len(runs) > 1), path)
    print(path)
    return path


def _other_content(file: Path, mark: str) -> str:
    """Return what a page's place holds that it must not replace: anything but a page of the same runs and title."""
    if not file.exists():
        return ""
    content = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    if MARK.format(mark) in content:
        return ""
    return "a report of other runs" if MARK.partition("{")[0] in content else "something that report did not write"


def _distinguish_names(runs: list[Run]) -> None:
    """Put their parent folders before the names of runs that are called the same."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = "/".join(run.folder.resolve().parts[-2:])


def _distinct_models(runs: list[Run]) -> list[MeasuredModel]:
    """Return every model once for each way in which it was measured: many runs start from the same original."""
    models: list[MeasuredModel] = []
    for model in (model for run in runs for model in run.models):
        if model not in models:
            models.append(model)
    return models


def _summarize(models: list[MeasuredModel]) -> dict[str, list[Cell]]:
    """Return the columns of the table by their heads, without empty ones."""
    largest = max((model.parameters or 0 for model in models), default=0)
    numbers: dict[str, tuple[str, Callable[[MeasuredModel], float | None]]] = {
        "parameters": ("{:,}", lambda m: m.parameters),
        "of the largest": ("{:.3f}", lambda m: m.parameters / largest if m.parameters else None),
        "MACs, billions": ("{:.2f}", lambda m: m.macs / 1e9 if m.macs else None),
        "latency, ms": ("{:.1f}", lambda m: m.latency),
    }
    for text in dict.fromkeys(text for model in models for text in model.perplexity):
        numbers[f"perplexity, {text}"] = ("{:.2f}", lambda m, t=text: m.perplexity.get(t))  # type: ignore[misc]
    numbers["accuracy"] = ("{:.4f}", lambda m: m.accuracy)
    columns: dict[str, list[Cell]] = {
        "model": [(model.model, model.model) for model in models],
        "stage": [(model.stage, model.stage) for model in models],
    }
    for head, (form, number_of) in numbers.items():
        values = [number_of(model) for model in models]
        if any(value is not None for value in values):
            columns[head] = [("", float("inf")) if value is None else (form.format(value), value) for value in values]
    return columns


def _write_figures(drawings: list[Drawing], folder: Path) -> None:
    """Write every figure as SVG and PNG, for papers."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for drawing in drawings:
            for form in ("svg", "png"):
                drawing.write(folder / f"{drawing.name}.{form}", form, dpi=PRINT_DPI)
    except OSError as error:
        raise PrunerError(f"cannot write {folder}: {error.strerror or error}") from error

"""Write one page about runs: tables and figures in a single file that opens from disk."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..files import digest, place_for_run, write_text
from ..logs import log
from ..version import __version__
from .arguments import DEFAULT_OUTPUT, ReportArguments
from .comparison import compare_models
from .figure_files import make_names_unique, other_figures, write_figures
from .figures import draw_pruning, draw_recoveries
from .models import merge_models
from .runs import MeasuredModel, Run, folders_of, read
from .summary import summarize
from .sweeps import draw_sweep, read_sweep, tabulate_sweep
from .tradeoffs import draw_tradeoffs, styles_of_models

EVALUATIONS = "evaluations"  # folder of a recipe, with an evaluation of every model
MARK = '<meta name="llm-pruner-report" content="{}">'  # in page.html; tells a page of the same runs from others


def write_report(args: ReportArguments) -> Path:
    """Run ``llm-pruner report``: write the page, print and return its path.

    Raises:
        PrunerError: a folder holds no run, --output or --figures holds another report, or cannot be written.
    """
    args.check()
    mark = digest([args.runs, args.title])
    path = place_for_run(
        Path(args.output),
        lambda file: _other_content(file, mark),
        flag="output",
        named=args.output != DEFAULT_OUTPUT,
    )
    figures = _place_for_figures(args.figures, mark) if args.figures else None
    runs = [read(folder) for path in args.runs for folder in folders_of(path)]
    sweeps = [sweep for path in args.runs if (sweep := read_sweep(path)) is not None]
    _distinguish_names(runs)
    models = merge_models(runs)
    _name_stages(runs, models)
    quality = compare_models(models)
    compared = [quality.drawing] if quality and quality.drawing else []
    tradeoffs, recoveries = draw_tradeoffs(models), draw_recoveries(runs)
    curves = [(sweep, draw_sweep(sweep, styles_of_models(models)), tabulate_sweep(sweep)) for sweep in sweeps]
    details = [(run, draw_pruning(run)) for run in runs if run.folder.parent.name != EVALUATIONS or run.samples]
    drawings = [*compared, *tradeoffs, *(d for _, drawn, _ in curves for d in drawn), *recoveries]
    drawings += [drawing for _, drawn in details for drawing in drawn]
    make_names_unique(drawings)
    page = (
        _environment()
        .get_template("page.html")
        .render(
            title=args.title,
            version=__version__,
            mark=mark,
            runs=runs,
            summary=summarize(models),
            quality=quality,
            overall=tradeoffs,
            sweeps=curves,
            recoveries=recoveries,
            details=details,
            svg=lambda drawing: Markup(drawing.svg()),
            zip=zip,
        )
    )
    if figures:
        write_figures(drawings, figures, mark)
    write_text(path, page)
    log.info("report of %d run%s: %s", len(runs), "s" * (len(runs) > 1), path)
    print(path)
    return path


def _place_for_figures(folder: str, mark: str) -> Path:
    place = Path(folder)
    return place_for_run(place, lambda place: other_figures(place, mark), flag="figures", named=True)


def _environment() -> Environment:
    return Environment(loader=PackageLoader(__name__, "."), autoescape=True, undefined=StrictUndefined)


def _other_content(file: Path, mark: str) -> str:
    """Return, in words, the content of a file that must not be replaced: all but a page of the same runs and title."""
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
        if names.count(run.name) > 1 and not run.is_stage:
            run.name = "/".join(run.folder.resolve().parts[-2:])


def _name_stages(runs: list[Run], models: list[MeasuredModel]) -> None:
    """Name the points of a sweep by their models, in their order: a recipe named their folders all alike."""
    names = {model.model: model.name for model in models}
    places = list(names)
    stages = sorted(
        (run for run in runs if run.is_stage and str(run.folder.resolve()) in names),
        key=lambda run: places.index(str(run.folder.resolve())),
    )
    ordered = iter(stages)
    runs[:] = [next(ordered) if any(run is stage for stage in stages) else run for run in runs]
    for run in stages:
        run.name = names[str(run.folder.resolve())]

"""The command ``llm-pruner run``: a recipe stage by stage, or all points of a sweep; finished work is skipped."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from ..checkpoint.next_steps import log_next_steps
from ..errors import PrunerError
from ..evaluation.tabular import TERMINAL, terminal_tables
from ..files import folder_lock, lock_holder, read_json, strict_json, write_text
from ..logs import log, logging_to
from ..provenance import provenance
from ..pruning.loading import keeping_model
from .arguments import RunArguments
from .dry_run import dry_run_tables, predict_points, predict_stages, sweep_cells
from .executors import EXECUTORS, Work, check_executor, worker_command
from .recipe import MODEL, Recipe, read
from .results import Row, stage_cells, summarize, write_points, write_stages
from .run_point import read_record, run_points, write_record
from .status import show_status
from .steps import measure_original, measure_step, run_step
from .sweep import RUN_LOG, SEED, SweepPoint, check_point, points_of
from .torchrun import Launch

SWEEP_FILE = "sweep.json"
MANY = 200  # points that need --yes
KILLED = "the process was killed, perhaps for lack of memory"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Outcome of the points of a sweep.

    Attributes:
        rows: results of finished points.
        failed: failed points with their errors.
        missing: points that have not ended.
    """

    rows: list[Row] = field(default_factory=list)
    failed: list[tuple[SweepPoint, str]] = field(default_factory=list)
    missing: list[SweepPoint] = field(default_factory=list)

    @classmethod
    def of(cls, points: Sequence[SweepPoint]) -> Outcome:
        outcome = cls()
        for point in points:
            record = read_record(point)
            if record is None:
                outcome.missing.append(point)
            elif "error" in record:
                outcome.failed.append((point, record["error"]))
            else:
                outcome.rows.append(record["row"])
        return outcome


def run_recipe(args: RunArguments) -> Path | None:
    """Run ``llm-pruner run``; return the output folder, None if nothing runs (``--dry_run``, ``--status``).

    Raises:
        PrunerError: the recipe is not valid, a stage fails, or another process is running a recipe in the folder.
    """
    args.check()
    recipe = _with_overrides(read(args.recipe), args)
    points, output = points_of(recipe), Path(recipe.output)
    if args.worker:
        with keeping_model():
            run_points(points)
        return output
    if args.status:
        show_status(points, output, sweep=recipe.is_sweep)
        return None
    if args.dry_run:
        _predict(recipe, points)
        return None
    for point in points:
        check_point(point)
    check_executor(recipe.executor)
    if len(points) > MANY and not args.yes:
        raise PrunerError(f"{args.recipe} makes {len(points)} runs: add --yes to start them")
    if not recipe.is_sweep and recipe.executor.kind != "local":
        _run_as_one_job(recipe, args)
        return output
    with _only_process_in(output), logging_to(output / RUN_LOG):
        if recipe.is_sweep:
            _run_sweep(recipe, points, _worker_arguments(args))
        else:
            _run_stages(points[0])
    return output


def _with_overrides(recipe: Recipe, args: RunArguments) -> Recipe:
    executor = recipe.executor.model_copy(update={"kind": args.executor}) if args.executor else recipe.executor
    return replace(recipe, model=args.model or recipe.model, output=args.output or recipe.output, executor=executor)


def _predict(recipe: Recipe, points: Sequence[SweepPoint]) -> None:
    """Print the shapes and sizes that the stages of a run or the points of a sweep leave.

    Raises:
        PrunerError: a run cannot work; in a sweep, the error names the first such run, and follows the table.
    """
    console = Console()
    unavailable: list[str] = []
    if not recipe.is_sweep:
        check_point(points[0], unavailable)
    rows = predict_points(points, unavailable) if recipe.is_sweep else []
    cells = sweep_cells(rows) if rows else predict_stages(points[0].recipe, points[0].steps)
    shared_shapes, tables = dry_run_tables(cells, console.width)
    if shared_shapes:
        print(shared_shapes)
    for table in tables:
        console.print(table)
    for message in dict.fromkeys(unavailable):
        print(f"not on this machine, and refused when the recipe is run here: {message}")
    refused = [row for row in rows if row.problem]
    for row in refused:
        print(f"cannot work: {row.point.title}: {row.problem}")
    if refused:
        runs = sum(row.runs for row in refused)
        raise PrunerError(
            f"{runs} of {len(points)} runs cannot work; the first is {refused[0].point.title}: {refused[0].problem}"
        )


def _run_as_one_job(recipe: Recipe, args: RunArguments) -> None:
    """Run a recipe without a sweep as a single job of a cluster."""

    def report_failure(_: int) -> bool:
        raise PrunerError("the job failed: its log says why; the same command continues the run")

    command = worker_command([*_worker_arguments(args), "--executor", "local"])
    work = Work(command=command, points=1, output=Path(recipe.output), replace_worker=report_failure)
    EXECUTORS[recipe.executor.kind](work, recipe.executor)


def _worker_arguments(args: RunArguments) -> list[str]:
    """Return the arguments that a worker shares with this process."""
    given = {name: getattr(args, name) for name in ("model", "output")}
    named = (part for name, value in given.items() if value for part in (f"--{name}", value))
    return [args.recipe, *named, *["--quiet"] * args.quiet]


@contextmanager
def _only_process_in(output: Path) -> Iterator[None]:
    """Keep other processes from running recipes in a folder."""
    with folder_lock(output, "recipe", wait=False) as free:
        if not free:
            raise PrunerError(f"another process is running a recipe in {output}: wait for it, or give another output")
        yield


def _run_stages(point: SweepPoint) -> None:
    """Run the stages of one run; write the table of results after each."""
    recipe, steps, launch = point.recipe, point.steps, Launch.of(point.recipe.executor)
    rows: list[Row] = []
    if recipe.evaluate is not None:
        rows.append({"stage": "original"} | measure_original(recipe))
    for i, step in enumerate(steps):
        record = run_step(steps, i, launch)
        row: Row = {"stage": step.stage.name, "folder": step.folder.name, "seconds": record["seconds"]}
        if recipe.evaluate is not None and step.leaves is not None:
            row |= measure_step(recipe, steps, i, launch)
        rows.append(row)
        write_stages(rows, point.folder)
    _print_table(stage_cells(rows))
    last = next((step for step in reversed(steps) if step.leaves is not None), None)
    if last is not None:
        log_next_steps(Path(str(last.leaves)), last.stage.command, original=recipe.model)
    log.info("page:  %s", shlex.join(["llm-pruner", "report", recipe.output]))


def _run_sweep(recipe: Recipe, points: Sequence[SweepPoint], arguments: list[str]) -> None:
    """Run all unfinished points of a sweep, failed ones again, by the workers of the executor."""
    output = Path(recipe.output)
    _refuse_other_sweep(recipe, points)
    before = Outcome.of(points)
    for point, _ in before.failed:
        point.file.unlink(missing_ok=True)
    unfinished = len(before.failed) + len(before.missing)
    log.info("%d runs, %d to do, %s", len(points), unfinished, recipe.executor.kind)
    if unfinished:
        command = worker_command([*arguments, "--worker"])
        work = Work(
            command=command,
            points=unfinished,
            output=output,
            replace_worker=lambda worker: _record_killed_worker(points, worker),
        )
        EXECUTORS[recipe.executor.kind](work, recipe.executor)
        _record_killed_points(points)
    outcome = Outcome.of(points)
    _write_table(points, outcome.rows)
    for point, error in outcome.failed:
        log.info("run %d (%s) failed: %s", point.number, point.name, error)
    if outcome.failed or outcome.missing:
        count = len(outcome.failed) + len(outcome.missing)
        raise PrunerError(
            f"{count} of {len(points)} runs failed (see {output / RUN_LOG}); the same command tries them again"
        )


def _record_killed_worker(points: Sequence[SweepPoint], worker: int) -> bool:
    """Record the point that a killed worker of this machine held as failed.

    Returns:
        True if the worker held a point and others are left: a worker that fails at once is not replaced.
    """
    if not worker:
        return False
    missing = Outcome.of(points).missing
    held = [point for point in missing if lock_holder(point.folder, point.lock)[0] == worker]
    for point in held:
        write_record(point, {"error": KILLED})
    return bool(held) and len(missing) > len(held)


def _record_killed_points(points: Sequence[SweepPoint]) -> None:
    """Record points of killed workers, on any machine, as failed: points whose lock has no living holder."""
    for point in Outcome.of(points).missing:
        if lock_holder(point.folder, point.lock)[0]:
            with folder_lock(point.folder, point.lock, wait=False) as free:
                if free:
                    write_record(point, {"error": KILLED})


def _write_table(points: Sequence[SweepPoint], rows: list[Row]) -> None:
    """Write and print the results of a sweep, after those of the originals unless only models are compared."""
    if not rows:
        return
    varied = list(dict.fromkeys(key for point in points for key in point.values))
    models = dict.fromkeys(row.get(MODEL) for row in rows)  # None where the model is not varied
    if points[0].recipe.evaluate is not None and (len(models) == 1 or {*varied} - {MODEL, SEED}):
        recipes = {point.values.get(MODEL): point.recipe for point in points}
        originals = [measure_original(recipes[model]) | ({MODEL: model} if model else {}) for model in models]
        rows = [*({"point": 0} | row for row in originals), *rows]
    write_points(rows, varied, points[0].folder)
    summary = summarize(rows, varied)
    _print_table(summary.cells(TERMINAL), summary.labels)


def _print_table(cells: list[list[str]], labels: int = 1) -> None:
    """Print results in as many tables as the terminal's width needs; the first ``labels`` columns name the row."""
    console = Console()
    for part in terminal_tables(cells, console.width, labels):
        console.print(part)


def _refuse_other_sweep(recipe: Recipe, points: Sequence[SweepPoint]) -> None:
    """Refuse a folder that holds another sweep."""
    varied = sorted({key for point in points for key in point.values})
    file = Path(recipe.output) / SWEEP_FILE
    try:
        before = read_json(file)["varied"]
    except (OSError, ValueError, KeyError):
        before = varied
    if before != varied:
        raise PrunerError(f"{recipe.output} holds another sweep, over {', '.join(before)}: give another output")
    content = {"recipe": recipe.source.path, "varied": varied, **provenance()}
    write_text(file, strict_json(content))

"""Running a recipe, or all points of a sweep: what is finished is not done again, what is missing is."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from ..errors import PrunerError
from ..evaluation.table import terminal_table
from ..files import folder_lock, lock_holder, write_text
from ..logs import log, logging_to
from ..provenance import provenance
from ..pruning.run import keeping_model
from .arguments import RunArguments
from .dry_run import dry_run
from .executors import EXECUTORS, POLL, run_command
from .recipe import Recipe, fault, near, read
from .results import Row, cells, of_points, of_stages, write_points, write_stages
from .stages import note_of
from .steps import evaluation, measure_model, remove_weights, run_step, steps_of
from .sweep import SweepPoint, points_of
from .torchrun import Launch

LOG_FILE, SWEEP_FILE, POINTS = "run.log", "sweep.json", "points"
MANY = 200  # points that need --yes
WIDTH = 160
KILLED = "the process was killed: out of memory, perhaps"


def run_recipe(args: RunArguments) -> Path | None:
    """Run a recipe; returns its output folder.

    Raises:
        PrunerError: the recipe is wrong, a stage cannot do its work, or another process is at it.
    """
    args.check()
    recipe = read(args.recipe)
    recipe.model, recipe.output = args.model or recipe.model, args.output or recipe.output
    if args.executor:
        recipe.executor["kind"] = args.executor
    kind = recipe.executor.setdefault("kind", "local")
    if kind not in EXECUTORS:
        raise fault(recipe.path, recipe.lines, ("executor",), f"unknown executor {kind!r}{near(kind, EXECUTORS)}")
    points, output = points_of(recipe), Path(recipe.output)
    sweep = recipe.sweep is not None or bool(recipe.seeds)
    if args.worker:
        with keeping_model():
            for point in points:
                run_point(point, output)
                if not recipe.keep_models:
                    _let_go(point, points, output)
        return output
    if args.status:
        _watch(points, output, sweep)
        return None
    for point in points:
        _checked(point)
    if args.dry_run:
        for point in points[:MANY]:
            console = Console(width=WIDTH)
            if sweep:
                console.print(f"{point.number} of {len(points)}: {point.name}")
            console.print(terminal_table(dry_run(point.recipe, steps_of(point.recipe))))
        return None
    if len(points) > MANY and not args.yes:
        raise PrunerError(f"{args.recipe} makes {len(points)} runs: add --yes if that is meant")
    if not sweep and kind != "local":  # one job, which runs it as if there
        EXECUTORS[kind](run_command(_passed_on(args), "--executor", "local"), recipe.executor, 1, output, _lost)
        return output
    with _alone_in(output), logging_to(output / LOG_FILE):
        if sweep:
            _run_sweep(recipe, points, output, _passed_on(args))
        else:
            _run_stages(points[0], output)
    return output


def _run_stages(point: SweepPoint, output: Path) -> None:
    """One run, stage by stage, with a table that grows."""
    recipe, rows = point.recipe, list[Row]()
    if recipe.evaluate is not None:
        rows.append({"stage": "original"} | measure_model(recipe, recipe.model, recipe.model))
    steps = steps_of(recipe)
    for i, step in enumerate(steps):
        note = run_step(steps, i, Launch.of(recipe.executor))
        row: Row = {"stage": step.stage.name, "folder": step.folder.name, "seconds": note["seconds"]}
        if recipe.evaluate is not None and step.leaves is not None:
            row |= measure_model(recipe, str(step.leaves), step.key)
        rows.append(row)
        write_stages(rows, output)
    Console(width=WIDTH).print(terminal_table(of_stages(rows)))


def _run_sweep(recipe: Recipe, points: list[SweepPoint], output: Path, arguments: list[str]) -> None:
    """All points, by the workers of an executor."""
    _same_sweep(recipe, points, output)
    missing = [point for point in points if "error" in (record(point, output) or {"error": ""})]
    for point in missing:  # those that failed are tried again
        _file(point, output).unlink(missing_ok=True)
    log.info("%d runs, %d to do, %s", len(points), len(missing), recipe.executor["kind"])

    def died(worker: int) -> bool:
        """A worker that was killed has not noted it itself. One that was at no point is not replaced."""
        held = [
            p for p in points if worker and record(p, output) is None and lock_holder(output, _lock(p))[0] == worker
        ]
        for point in held:
            _note(point, output, {"error": KILLED})
        return bool(held) and any(record(point, output) is None for point in points)

    if missing:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // recipe.executor.get("jobs", 1))))
        EXECUTORS[recipe.executor["kind"]](
            run_command(arguments, "--worker"), recipe.executor, len(missing), output, died
        )
        for point in points:  # jobs that were killed on other machines have not noted it either
            if record(point, output) is None and lock_holder(output, _lock(point))[0]:
                with folder_lock(output, _lock(point), wait=False) as free:
                    if free:
                        _note(point, output, {"error": KILLED})
    rows: list[Row] = [found["row"] for point in points if "row" in (found := record(point, output) or {})]
    if rows and recipe.evaluate is not None and len({point.recipe.model for point in points}) == 1:
        model = points[0].recipe.model
        rows.insert(0, {"point": 0} | measure_model(points[0].recipe, model, model))  # measured by the workers
    varied = list(dict.fromkeys(key for point in points for key in point.values))
    if rows:
        write_points(rows, varied, output)
        Console(width=WIDTH).print(terminal_table(cells(of_points(rows, varied), ("[bold]", "[/bold]"))))
    failed = [(point, found) for point in points if "error" in (found := record(point, output) or {})]
    left = [point for point in points if record(point, output) is None]
    for point, found in failed:
        log.info("run %d (%s) failed: %s", point.number, point.name, found["error"])
    if failed or left:
        raise PrunerError(
            f"{len(failed) + len(left)} of {len(points)} runs failed (see {output / LOG_FILE}); the same command tries "
            "them again"
        )


def _lost(_: int) -> bool:
    """A job that runs a whole recipe failed: it has said why."""
    raise PrunerError("the job failed: its log says why; the same command goes on with it")


def _let_go(point: SweepPoint, points: list[SweepPoint], output: Path) -> None:
    """Remove the weights of a finished point that none still to come begins with."""
    if "row" not in (record(point, output) or {}):
        return
    needed = {s.key for other in points if record(other, output) is None for s in steps_of(other.recipe)}
    for step in steps_of(point.recipe):
        if step.key not in needed:
            remove_weights(step)


def run_point(point: SweepPoint, output: Path) -> None:
    """Do a point, unless it is done or another worker is at it; what goes wrong is noted, and stops no other."""
    with folder_lock(output, _lock(point), wait=False) as free:
        if not free or record(point, output) is not None:
            return
        start = time.perf_counter()
        try:
            with logging_to(_file(point, output).with_suffix(".log")):
                row = _done(point)
        except PrunerError as error:
            found: dict[str, Any] = {"error": " ".join(str(error).split())}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        else:
            found = {"row": {"point": point.number, **point.values, **row}}
        _note(point, output, found | {"seconds": round(time.perf_counter() - start, 2)})


def _done(point: SweepPoint) -> Row:
    """The measurements of what the last stage of a point leaves, and the seconds that its stages took."""
    recipe, steps = point.recipe, steps_of(point.recipe)
    last = next((step for step in reversed(steps) if step.leaves is not None), None)
    notes = [run_step(steps, i, Launch.of(recipe.executor)) for i in range(len(steps))]
    row: Row = {}
    if recipe.evaluate is not None and last is not None:
        measure_model(recipe, recipe.model, recipe.model)
        row = measure_model(recipe, str(last.leaves), last.key)
    return row | {"seconds": round(sum(note["seconds"] for note in notes), 1)}


def record(point: SweepPoint, output: Path) -> dict[str, Any] | None:
    """What is noted of a point; None where it is not finished."""
    try:
        return dict(json.loads(_file(point, output).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _key(point: SweepPoint) -> str:
    return steps_of(point.recipe)[-1].key[:8]


def _file(point: SweepPoint, output: Path) -> Path:
    return output / POINTS / f"{point.number:04}-{_key(point)}.json"


def _lock(point: SweepPoint) -> str:
    return f"point-{point.number:04}-{_key(point)}"


def _note(point: SweepPoint, output: Path, found: dict[str, Any]) -> None:
    steps = [step.folder.name for step in steps_of(point.recipe)]
    about = {"values": point.values, "stages": steps, **found, **provenance()}
    write_text(_file(point, output), json.dumps(about, indent=1, default=str) + "\n")


def _same_sweep(recipe: Recipe, points: list[SweepPoint], output: Path) -> None:
    """Keep two sweeps out of one folder."""
    varied = sorted({key for point in points for key in point.values})
    file = output / SWEEP_FILE
    try:
        before = json.loads(file.read_text(encoding="utf-8"))["varied"]
    except (OSError, ValueError, KeyError):
        before = varied
    if before != varied:
        raise PrunerError(f"{output} holds another sweep, over {', '.join(before)}: give another output")
    write_text(file, json.dumps({"recipe": recipe.path, "varied": varied, **provenance()}, indent=1) + "\n")


def _watch(points: list[SweepPoint], output: Path, sweep: bool) -> None:
    """A table of the points, or of the stages of the only one, live on a terminal until all are done."""
    steps = steps_of(points[0].recipe)

    def states() -> list[list[str]]:
        if not sweep:
            notes = [note_of(step.folder) for step in steps]
            entries = [(i, s.stage.name, s.key, note) for i, (s, note) in enumerate(zip(steps, notes, strict=True), 1)]
        else:
            found = [record(point, output) for point in points]
            entries = [(p.number, p.name, _lock(p), note) for p, note in zip(points, found, strict=True)]
        rows = []
        for number, name, lock, told in entries:
            process, lives = lock_holder(output, lock)
            state, note = ("running" if lives else "interrupted") if process else "waiting", ""
            if told is not None:
                seconds = told.get("row", told).get("seconds")
                state, note = ("failed", told["error"]) if "error" in told else ("done", f"{seconds} s")
            rows.append([str(number), name, state, note])
        return rows

    def table() -> Any:
        return terminal_table([["run" if sweep else "stage", "what", "state", ""], *states()])

    if not output.is_dir():
        raise PrunerError(f"there is no {output}: nothing was run yet")
    if not sys.stdout.isatty():
        Console(width=WIDTH).print(table())
        return
    with Live(table(), refresh_per_second=1) as live:
        while any(state in ("running", "waiting") for _, _, state, _ in states()):
            time.sleep(5 * POLL)
            live.update(table())


def _passed_on(args: RunArguments) -> list[str]:
    """The arguments of a worker."""
    given = [args.recipe]
    for name in ("model", "output"):
        if getattr(args, name):
            given += [f"--{name}", getattr(args, name)]
    return given


def _checked(point: SweepPoint) -> None:
    """Refuse a stage that cannot work before the first one is run."""
    recipe = point.recipe
    try:
        evaluation(recipe, recipe.model).check()
    except PrunerError as error:
        raise fault(recipe.path, recipe.lines, ("evaluate",), str(error)) from error
    for i, step in enumerate(steps_of(recipe)):
        try:
            args = step.arguments()
            args.check()
        except PrunerError as error:
            where = f" (run {point.number}: {point.name})" if point.values else ""
            raise fault(recipe.path, recipe.lines, ("stages", i), f"{error}{where}") from error


@contextmanager
def _alone_in(output: Path) -> Iterator[None]:
    """Keep other processes from running recipes in a folder."""
    with folder_lock(output, "recipe", wait=False) as free:
        if not free:
            raise PrunerError(f"another process is at work in {output}: wait for it, or give another output")
        yield

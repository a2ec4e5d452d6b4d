"""One point of a sweep: run it, measure it, and record how it ended."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from typing import Any

from ..errors import PrunerError
from ..files import folder_lock, read_json, strict_json, write_text
from ..logs import logging_to
from ..provenance import provenance
from .results import Row
from .steps import measure_original, measure_step, remove_weights, run_step
from .sweep import SweepPoint
from .torchrun import Launch

Record = dict[str, Any]  # "row" of a finished run or "error" of a failed one


def run_points(points: Sequence[SweepPoint]) -> None:
    """Run all points that are neither finished nor held by another worker."""
    for point in points:
        run_point(point)
        if not point.recipe.keep_models:
            remove_unneeded_weights(point, points)


def run_point(point: SweepPoint) -> None:
    """Run a point unless it is recorded or another worker holds it; record an error instead of raising it."""
    with folder_lock(point.folder, point.lock, wait=False) as free:
        if not free or read_record(point) is not None:
            return
        start = time.perf_counter()
        try:
            with logging_to(point.file.with_suffix(".log")):
                row = run_and_measure(point)
        except PrunerError as error:
            record: Record = {"error": " ".join(str(error).split())}
        except Exception as error:
            record = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        else:
            record = {"row": {"point": point.number, **point.values, **row}}
        write_record(point, record | {"seconds": round(time.perf_counter() - start, 2)})


def run_and_measure(point: SweepPoint) -> Row:
    """Run the stages of a point; return the measurements of its last checkpoint, and the seconds of all stages."""
    recipe, steps, launch = point.recipe, point.steps, Launch.of(point.recipe.executor)
    records = [run_step(steps, i, launch) for i in range(len(steps))]
    row: Row = {}
    last = next((i for i in reversed(range(len(steps))) if steps[i].leaves is not None), None)
    if recipe.evaluate is not None and last is not None:
        measure_original(recipe)
        row = measure_step(recipe, steps, last, launch)
    return row | {"seconds": round(sum(record["seconds"] for record in records), 1)}


def read_record(point: SweepPoint) -> Record | None:
    """Return how a point ended, None for one that has not."""
    try:
        return dict(read_json(point.file))
    except (OSError, ValueError):
        return None


def write_record(point: SweepPoint, record: Record) -> None:
    """Record how a point ended, with its values, its stages' folders and its provenance."""
    folders = [step.folder.name for step in point.steps]
    content = {"values": point.values, "stages": folders, **record, **provenance()}
    write_text(point.file, strict_json(content))


def remove_unneeded_weights(point: SweepPoint, points: Sequence[SweepPoint]) -> None:
    """Remove the weights of a finished point that no unfinished point begins with."""
    if "row" not in (read_record(point) or {}):
        return
    needed = {step.key for other in points if read_record(other) is None for step in other.steps}
    for step in point.steps:
        if step.key not in needed:
            remove_weights(step)

"""Progress of a run or a sweep: what is done, running, failed or waiting."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ..errors import PrunerError
from ..evaluation.tabular import terminal_table
from ..files import lock_holder
from . import run_point, stages
from .sweep import SweepPoint

REFRESH_SECONDS = 1.0
TABLE_WIDTH = 160
UNFINISHED = ("running", "waiting")


@dataclass(frozen=True, kw_only=True)
class Status:
    """State of a point or a stage: done, running, failed, interrupted or waiting."""

    number: int
    name: str
    state: str
    note: str = ""


def show_status(points: Sequence[SweepPoint], output: Path, *, sweep: bool) -> None:
    """Print the state of all points, or of the stages of a single run; on a terminal, follow it to the end.

    Raises:
        PrunerError: nothing was run yet.
    """
    if not output.is_dir():
        raise PrunerError(f"there is no {output}: nothing was run yet")

    def read_statuses() -> list[Status]:
        return [_point_status(point) for point in points] if sweep else _stage_statuses(points[0])

    if not sys.stdout.isatty():
        Console(width=TABLE_WIDTH).print(_table(read_statuses(), sweep))
        return
    with Live(_table(read_statuses(), sweep)) as live:
        while any(status.state in UNFINISHED for status in read_statuses()):
            time.sleep(REFRESH_SECONDS)
            live.update(_table(read_statuses(), sweep))


def _point_status(point: SweepPoint) -> Status:
    record = run_point.read_record(point)
    state, note = _state(record, record and record.get("row"), point.folder, point.lock)
    return Status(number=point.number, name=point.name, state=state, note=note)


def _stage_statuses(point: SweepPoint) -> list[Status]:
    statuses = []
    for i, step in enumerate(point.steps, 1):
        record = stages.read_record(step.folder)
        state, note = _state(record, record, point.folder, step.key)
        statuses.append(Status(number=i, name=step.stage.name, state=state, note=note))
    return statuses


def _state(record: dict[str, Any] | None, timed: Any, output: Path, lock: str) -> tuple[str, str]:
    if record is not None and "error" in record:
        return "failed", record["error"]
    if record is not None:
        return "done", f"{(timed or record).get('seconds')} s"
    process, alive = lock_holder(output, lock)
    return ("running" if alive else "interrupted") if process else "waiting", ""


def _table(statuses: Sequence[Status], sweep: bool) -> Table:
    head = ["run" if sweep else "stage", "name", "state", ""]
    return terminal_table([head, *([str(s.number), s.name, s.state, s.note] for s in statuses)])

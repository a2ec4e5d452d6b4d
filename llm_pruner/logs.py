"""Logs of runs: terminal and file."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from tqdm import tqdm

log = logging.getLogger("llm_pruner")
_open: list[Path | None] = []  # logs being written, outermost first
_quiet = ContextVar("quiet", default=False)


class _TerminalHandler(logging.Handler):
    """Write to stderr, above progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def quiet_terminal(quiet: bool) -> Iterator[None]:
    """Keep all but warnings of the logs that are opened in the block off the terminal."""
    token = _quiet.set(quiet)
    try:
        yield
    finally:
        _quiet.reset(token)


def is_quiet() -> bool:
    """Return True within :func:`quiet_terminal`."""
    return _quiet.get()


def inside_another_run() -> bool:
    """Return True if the run whose log is being written is part of another, as a stage of a recipe is."""
    return len(_open) > 1


def started_processes() -> int:
    """Return the number of processes that torchrun or accelerate started with this one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Return True in the process that logs, measures and writes for all."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def least_level(name: str, level: int) -> Iterator[None]:
    """Let a logger pass only records of a level and above, within the block."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def logging_to(path: Path | None, quiet: bool = False) -> Iterator[None]:
    """Send the log to the terminal and append it to a file; the logger is left as it was.

    Args:
        path: the file; None for a command that keeps no log.
        quiet: send it nowhere, as all but the first of several processes do.
    """
    handlers: list[logging.Handler] = []
    if not quiet:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(logging.FileHandler(path, encoding="utf-8"))
        if not _open:  # a run inside another is on the terminal already
            handlers.append(_TerminalHandler(logging.WARNING if _quiet.get() else logging.INFO))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
    before = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False
    _open.append(path)
    try:
        yield
    finally:
        _open.remove(path)
        log.setLevel(before[0])
        log.propagate = before[1]
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()

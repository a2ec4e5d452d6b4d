"""Where the log of a run goes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("llm_pruner")
_open: list[Path] = []  # the logs that are written to just now


@contextmanager
def logging_to(path: Path, quiet: bool = False) -> Iterator[None]:
    """Send the log to the terminal and to a file; with ``quiet``, in all but the first of several processes, nowhere.

    The file is added to, so that a run that goes on has one log.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = []
    if not quiet:
        handlers = [logging.FileHandler(path, encoding="utf-8")]
        if not _open:  # a run inside another is on the terminal already
            handlers.append(logging.StreamHandler(sys.stderr))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    _open.append(path)
    try:
        yield
    finally:
        _open.remove(path)
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()

"""Where the log of a run goes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("llm_pruner")
_open: list[Path] = []  # logs being written, outermost first


@contextmanager
def logging_to(path: Path, quiet: bool = False) -> Iterator[None]:
    """Send the log to the terminal and append it to a file; the logger is left as it was.

    Args:
        quiet: send it nowhere, as all but the first of several processes do.
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

"""Show the progress of a long step and the time left: a bar on a terminal, a line a minute elsewhere.

Progress is shown within :func:`showing`, which commands and ``lp.prune`` open, for every step that goes through
:func:`track` or :class:`Step`, except for steps inside another step. The step itself only counts; a thread reads the
count, so that progress is shown even while a single part takes minutes.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any, TypeVar

from tqdm import tqdm

from .logs import is_first_process, quiet_terminal

T = TypeVar("T")
FIRST_BAR, BAR_SECONDS = 1.0, 0.5  # until a bar appears, and between two looks at it
FIRST_LINE, LINE_SECONDS = 10.0, 60.0  # the same for lines


class Bar:
    """A bar on a terminal, which goes away with its step."""

    first, seconds = FIRST_BAR, BAR_SECONDS

    def __init__(self) -> None:
        self._bar: Any = None

    def show(self, step: Step) -> None:
        if self._bar is None:
            self._bar = tqdm(total=step.total, desc=step.what, leave=False, dynamic_ncols=True, file=sys.stderr)
            self._bar.start_t, self._bar.delay = time.time() - step.elapsed, 0
        self._bar.n = step.done
        self._bar.set_postfix_str(step.note, refresh=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Lines:
    """A line of the log's form on stderr, which is a file or a pipe."""

    first, seconds = FIRST_LINE, LINE_SECONDS

    def show(self, step: Step) -> None:
        print(time.strftime("%H:%M:%S"), describe(step), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Do nothing: lines stay."""


@dataclass
class Shown:
    """Display of steps within :func:`showing`, and the step in progress."""

    display: type[Bar] | type[Lines] | None
    step: Step | None = None


_shown: ContextVar[Shown | None] = ContextVar("shown", default=None)


@contextmanager
def showing(quiet: bool = False) -> Iterator[None]:
    """Show the steps within the block on stderr, unless ``TQDM_DISABLE`` is set; with ``quiet``, no log either.

    Of several processes, only the first shows any.
    """
    quiet = quiet or not is_first_process()
    display: type[Bar] | type[Lines] | None = Bar if sys.stderr.isatty() else Lines
    if quiet or os.environ.get("TQDM_DISABLE", "0") not in ("", "0"):
        display = None
    shown = Shown(display)
    token = _shown.set(shown)
    try:
        with quiet_terminal(quiet), _foreign_bars(display):
            yield
    finally:
        _shown.reset(token)
        if shown.step is not None:  # an error came between: its loop is not closed yet
            shown.step.end()


class Step:
    """One step that counts what it has done, in a context.

    Attributes:
        what: the step in words, such as ``scoring``.
        total: number of parts; None if it is not known.
        done: parts done so far; set it or call :meth:`advance`.
        note: further numbers to show.

    Args:
        count: returns the parts done so far, for a step that cannot count itself.
    """

    def __init__(self, what: str, total: int | None = None, *, count: Callable[[], int] | None = None) -> None:
        self.what, self.total, self.done, self.note = what, total, 0, ""
        self._count = count
        self._start = time.monotonic()
        self._ended = Event()
        self._thread: Thread | None = None
        self._shown: Shown | None = None

    def __enter__(self) -> Step:
        shown = _shown.get()
        if shown is not None and shown.display is not None and shown.step is None:
            self._shown, shown.step = shown, self
            self._start = time.monotonic()
            self._thread = Thread(target=self._watch, args=(shown.display(),), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.end()

    def end(self) -> None:
        """End the step and take it off the screen; a step that has ended stays so."""
        self._ended.set()
        if self._thread is not None and self._shown is not None:
            self._thread.join()
            self._thread = self._shown.step = None

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def advance(self, count: int = 1) -> None:
        self.done += count

    def _watch(self, display: Bar | Lines) -> None:
        wait = display.first
        while not self._ended.wait(wait):
            with suppress(OSError, ValueError):  # a closed stderr, or files that come and go while they are counted
                self.done = self._count() if self._count else self.done
                display.show(self)
            wait = display.seconds
        display.close()


def track(iterable: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Iterate and show how far it is.

    Args:
        what: the step in words, such as ``scoring``.
        total: number of items, if ``len`` does not tell.

    >>> list(track(["a", "b"], "counting"))
    ['a', 'b']
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with Step(what, total) as step:
        for item in iterable:
            yield item
            step.done += 1


def describe(step: Step) -> str:
    """Return a step in words: what it does, how far it is, and about how long it still takes.

    >>> step = Step("scoring", total=128)
    >>> describe(step)
    'scoring: 0 of 128, 0 s so far'
    >>> step.done, step._start = 32, step._start - 90
    >>> describe(step)
    'scoring: 32 of 128 (25%), 1 min 30 s so far, about 4 min 30 s left'
    """
    parts = f"{step.done:,} of {step.total:,}" if step.total else f"{step.done:,}" if step.done else ""
    left = ""
    if step.total and step.done:
        parts += f" ({min(step.done / step.total, 1):.0%})"
        left = f", about {_duration(step.elapsed * max(step.total / step.done - 1, 0))} left"
    note = f", {step.note}" if step.note else ""
    return f"{step.what}: {parts}{', ' if parts else ''}{_duration(step.elapsed)} so far{left}{note}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def without_bars() -> AbstractContextManager[None]:
    """Draw none of tqdm's bars within the block; transformers draws some whatever its own switch says."""
    return _foreign_bars(None)


@contextmanager
def _foreign_bars(display: type[Bar] | type[Lines] | None) -> Iterator[None]:
    """Show the bars of other libraries as our own: on a terminal after a second, elsewhere as lines, or not at all."""
    bar: Any = tqdm
    initialise, draw = bar.__init__, bar.display
    forced: dict[str, Any] = {"leave": False, "delay": FIRST_BAR}
    if display is Lines:
        forced = {"leave": False, "file": io.StringIO()}  # print_line writes instead, by a clock of its own
    elif display is None:
        forced = {"disable": True}

    def initialise_otherwise(self: Any, *args: Any, **options: Any) -> None:
        self._next_line = time.monotonic() + FIRST_LINE
        initialise(self, *args, **options | forced)

    def print_line(self: Any, msg: str | None = None, pos: int | None = None) -> bool:
        if msg is None and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_SECONDS
            print(time.strftime("%H:%M:%S"), self, file=sys.stderr, flush=True)
        return True

    bar.__init__ = initialise_otherwise
    if display is Lines:
        bar.display = print_line
    try:
        yield
    finally:
        bar.__init__, bar.display = initialise, draw

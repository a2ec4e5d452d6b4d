"""Progress bars of other libraries, switched off for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from typing import Any

from tqdm.auto import tqdm


@contextmanager
def without_bars() -> Iterator[None]:
    """Draw none of tqdm's bars within the block; transformers draws some whatever its own switch says."""
    bar: Any = tqdm
    initialise = bar.__init__
    bar.__init__ = partialmethod(initialise, disable=True)
    try:
        yield
    finally:
        bar.__init__ = initialise

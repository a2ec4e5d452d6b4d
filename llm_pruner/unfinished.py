"""Results of unfinished steps, kept beside a run, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import PrunerError, in_one_line
from .files import digest, replaced_file
from .logs import log

INTERVAL = 60.0  # seconds between two writings,
SHARE = 10  # or so many times as long as a writing takes, whichever is longer


@contextmanager
def kept_until_done(folder: Path, *, fresh: bool = False) -> Iterator[Path]:
    """Yield a folder for the files of unfinished steps.

    It is removed when the block succeeds, and when it fails within the time in which nothing need be kept, unless an
    earlier run left it.

    Args:
        fresh: remove what another run left there first.
    """
    start = time.monotonic()
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    of_earlier_run = folder.exists()
    try:
        yield folder
    except BaseException:
        if not of_earlier_run and time.monotonic() - start < INTERVAL:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Kept:
    """Tensors and record of a step that was stopped."""

    tensors: dict[str, torch.Tensor]
    record: Any


class Unfinished:
    """File of what a step has done so far.

    A file that cannot be written is given up with a line in the log: the step itself goes on.

    Args:
        file: None keeps nothing.
        key: all that the result of the step depends on; a file with another key is not read.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "step.safetensors"
    >>> Unfinished(file, key=["a"]).write({"sum": torch.ones(2)}, {"done": 3})
    >>> Unfinished(file, key=["a"]).read().record
    {'done': 3}
    >>> Unfinished(file, key=["b"]).read() is None
    True
    """

    def __init__(self, file: Path | None = None, key: Any = None) -> None:
        self._file, self._key = file, digest(key)
        self._next = time.monotonic() + INTERVAL

    def read(self) -> Kept | None:
        """Return what a killed run left, None if it left nothing, or was another run."""
        if self._file is None:
            return None
        try:
            with safe_open(str(self._file), "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != self._key:
                    return None
                kept = Kept({name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata["record"]))  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        log.info("going on with what a run that was stopped left in %s", self._file)
        return kept

    @property
    def due(self) -> bool:
        """True if it is time to write again."""
        return self._file is not None and time.monotonic() >= self._next

    def write(self, tensors: Mapping[str, torch.Tensor], record: Any = None) -> None:
        """Replace the file by what is done by now, atomically."""
        if self._file is None:
            return
        start = time.monotonic()
        copies = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        try:
            with replaced_file(self._file) as temporary:
                save_file(copies, temporary, {"key": self._key, "record": json.dumps(record)})
        except (PrunerError, SafetensorError) as error:
            log.warning("going on without keeping what is done by now: %s", in_one_line(error))
            self._file = None
        end = time.monotonic()
        self._next = end + max(INTERVAL, SHARE * (end - start))


NOTHING_KEPT = Unfinished()

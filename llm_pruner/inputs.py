"""Checks of the models, texts, files and folders that flags name, before any work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .errors import PrunerError, Unavailable


@dataclass(frozen=True, kw_only=True)
class InputCheck:
    """Context of an input check.

    Attributes:
        written_later: folder that earlier stages of a recipe write; paths inside it are not checked.
        unavailable: collects messages about inputs that this machine lacks
            (:class:`~llm_pruner.errors.Unavailable`); None makes them errors.
    """

    written_later: Path | None = None
    unavailable: list[str] | None = None

    def skips(self, path: str | Path) -> bool:
        """Return True for a path inside the folder that is written later."""
        if self.written_later is None:
            return False
        return Path(path).expanduser().resolve().is_relative_to(self.written_later.expanduser().resolve())

    @contextmanager
    def flag(self, name: str, value: object) -> Iterator[None]:
        """Put a flag and its value before the errors of the block.

        Raises:
            PrunerError: as the block does, with the flag.
        """
        try:
            yield
        except PrunerError as error:
            message = str(error) if str(error).startswith("--") else f"--{name} {value}: {error}"
            if self.unavailable is None or not isinstance(error, Unavailable):
                raise type(error)(message) from error
            self.unavailable.append(message)

"""Writing files whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import PrunerError


def write_text(path: Path, content: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise PrunerError(f"cannot write {path}: {error.strerror or error}") from error

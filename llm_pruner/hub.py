"""Files of the model hub on this machine; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError


def cached_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """Return a file of a repository in the hub's cache; None if it is not there, or the hub has no such names.

    Args:
        revision: branch, tag or commit.
    """
    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None

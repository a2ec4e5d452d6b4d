"""Replace files that other processes may be reading."""

from __future__ import annotations

import os
import time
from pathlib import Path

READERS_BLOCK = os.name == "nt"  # an open file can be neither replaced nor removed


def replace_file(source: Path, target: Path) -> None:
    """Rename a file over another, which Windows refuses for as long as somebody reads the other."""
    for pause in (0.01, 0.1, 1.0):
        try:
            source.replace(target)
            return
        except PermissionError:
            if not READERS_BLOCK:
                raise
            time.sleep(pause)
    source.replace(target)

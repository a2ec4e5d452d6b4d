"""Provenance of a result: command, versions, machine, seed."""

from __future__ import annotations

import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from .version import __version__


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    return {
        "llm_pruner": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def command_line() -> str:
    """Return the command of this process as a user types it, without the folder that its program lies in."""
    program, *words = sys.argv
    path = Path(program)
    start = ["python", "-m", path.parent.name] if path.name == "__main__.py" else [path.name]
    return shlex.join([*start, *words])


def provenance(seed: int | None = None) -> dict[str, Any]:
    """Return the record that lets a run be repeated: command, seed, versions and machine."""
    cuda = torch.cuda.is_available()
    return {
        "command": command_line(),
        **({} if seed is None else {"seed": seed}),
        "versions": versions(),
        "machine": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads",
    }

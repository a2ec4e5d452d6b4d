"""What made a result: command, versions, machine, seed."""

from __future__ import annotations

import platform
import shlex
import sys
from typing import Any

import torch
import transformers

from .version import __version__


def provenance(seed: int | None = None) -> dict[str, Any]:
    """For the record that every run leaves: enough to run it again, and to know where numbers come from."""
    cuda = torch.cuda.is_available()
    return {
        "command": shlex.join(sys.argv),
        **({} if seed is None else {"seed": seed}),
        "versions": {
            "llm_pruner": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads",
    }

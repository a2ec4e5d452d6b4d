"""Ask vLLM about a folder, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..errors import PrunerError
from ..optional import require

WORKER = "llm_pruner.serving.vllm_worker"
ANSWER = "llm-pruner answer: "


def ask_vllm(folder: Path | str, *, trust_remote_code: bool = False, **request: Any) -> dict[str, Any]:
    """Return the worker's answer to a request (:mod:`llm_pruner.serving.vllm_worker`).

    Raises:
        PrunerError: vLLM is not installed, or refuses the folder; with its last error.
    """
    require("vllm", "vllm", "serving needs")
    document = json.dumps({"folder": str(folder), "trust_remote_code": trust_remote_code, **request})
    run = subprocess.run([sys.executable, "-m", WORKER], input=document, capture_output=True, text=True)
    answers = [line.removeprefix(ANSWER) for line in run.stdout.splitlines() if line.startswith(ANSWER)]
    if run.returncode or not answers:
        errors = [line for line in (run.stdout + run.stderr).splitlines() if "Error: " in line]
        raise PrunerError(f"vLLM cannot run {folder}: {(errors or ['it ended without an answer'])[-1].strip()}")
    return dict(json.loads(answers[-1]))


def next_log_probabilities(folder: Path | str, ids: list[int], *, trust_remote_code: bool = False) -> dict[int, float]:
    """Return the log-probabilities of the most probable next tokens, in float32, by their ids."""
    answer = ask_vllm(folder, ids=ids, dtype="float32", trust_remote_code=trust_remote_code)
    return {int(token): value for token, value in answer.items()}

"""Packages that only some commands need: an extra of ``pip install llm_pruner`` brings each."""

from __future__ import annotations

from importlib.util import find_spec

from .choices import EngineName
from .errors import PrunerError

ENGINES = {"vllm": ("vllm", "vllm"), "llama.cpp": ("xllamacpp", "llama-cpp")}  # module and extra
# Variables of vLLM's processes, where the user sets none: GiB for caches if it runs on a CPU (by default more than is
# free beside a loaded model), and no more than errors in its log.
VLLM_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def is_installed(module: str) -> bool:
    """Return True if a top-level module can be imported, without importing it."""
    return find_spec(module) is not None


def require(module: str, extra: str, need: str) -> None:
    """Refuse work that needs a package which is not installed; call this before any work is done.

    Args:
        module: top-level module of the package.
        extra: extra of ``llm_pruner`` that brings the package.
        need: beginning of the message, before the package's name.

    Raises:
        PrunerError: the package is not installed; the message has the line that installs it.

    >>> require("no_such_module", "eval", "tasks need")
    Traceback (most recent call last):
    llm_pruner.errors.PrunerError: tasks need no-such-module: pip install "llm_pruner[eval]"
    """
    if not is_installed(module):
        raise PrunerError(f'{need} {module.replace("_", "-")}: pip install "llm_pruner[{extra}]"')


def require_engine(engine: EngineName) -> None:
    """Refuse an engine whose package is not installed.

    Raises:
        PrunerError: with the line that installs it.
    """
    require(*ENGINES[engine], f"--engine {engine} needs")

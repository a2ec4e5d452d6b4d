"""Install per-layer configs in transformers as soon as transformers builds models, and not before.

Importing transformers takes seconds, and ``llm-pruner --help`` needs none of it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

TRIGGER = "transformers.modeling_utils"
PER_LAYER = "llm_pruner.models.per_layer"  # installs itself when it is imported


def install_when_imported() -> None:
    """Install per-layer configs once transformers' models are imported; at once if they are already."""
    if TRIGGER in sys.modules:
        import_module(PER_LAYER)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """A finder of the trigger module, for once, with a loader that installs per-layer configs after it."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _InstallingLoader(spec.loader)
        return spec


class _InstallingLoader(Loader):
    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        import_module(PER_LAYER)  # half imported already where it is what imports transformers

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

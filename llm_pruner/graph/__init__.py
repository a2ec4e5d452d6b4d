"""Discovery: which indices of which parameters belong together."""

from .tracer import TraceError, sources, traceable
from .units import KINDS, CouplingGraph, Unit, common_path, layer_lists, trace

__all__ = [
    "KINDS",
    "CouplingGraph",
    "TraceError",
    "Unit",
    "common_path",
    "layer_lists",
    "sources",
    "trace",
    "traceable",
]

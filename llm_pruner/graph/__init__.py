"""Discovery: which indices of which parameters belong together."""

from .tracer import TraceError, model_inputs, sources, traceable
from .units import KINDS, CouplingGraph, Unit, common_path, layer_lists, trace

__all__ = [
    "KINDS",
    "CouplingGraph",
    "TraceError",
    "Unit",
    "common_path",
    "layer_lists",
    "model_inputs",
    "sources",
    "trace",
    "traceable",
]

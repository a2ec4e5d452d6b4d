"""Discovery: which indices of which parameters belong together."""

from .constants import Constant, hook_selecting
from .loss import total_loss
from .stacks import Layers, given, layer_lists, passed
from .streaming import Compute, StandIns, computing, native, streamed
from .tracer import (
    Answering,
    TraceError,
    context_length,
    evaluating,
    implementations,
    model_inputs,
    predicted,
    sources,
    traceable,
)
from .units import KINDS, CouplingGraph, Unit, block_of, common_path, remember, trace

__all__ = [
    "KINDS",
    "Answering",
    "Compute",
    "Constant",
    "CouplingGraph",
    "Layers",
    "StandIns",
    "TraceError",
    "Unit",
    "block_of",
    "common_path",
    "computing",
    "context_length",
    "evaluating",
    "given",
    "hook_selecting",
    "implementations",
    "layer_lists",
    "model_inputs",
    "native",
    "passed",
    "predicted",
    "remember",
    "sources",
    "streamed",
    "total_loss",
    "trace",
    "traceable",
]

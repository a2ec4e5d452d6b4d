"""Measuring: what a model is worth, and what it costs."""

from .cost import macs, macs_budget, memory, memory_budget
from .perplexity import Perplexity, check_length, parameter_count, perplexity, windows
from .timing import latency, latency_budget

__all__ = [
    "Perplexity",
    "check_length",
    "latency",
    "latency_budget",
    "macs",
    "macs_budget",
    "memory",
    "memory_budget",
    "parameter_count",
    "perplexity",
    "windows",
]

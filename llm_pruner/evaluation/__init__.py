"""Measuring: what a model is worth, and what it costs."""

from .compare import PROMPTS, Evaluation, Wanted, compare, evaluate, pad_id
from .cost import macs, macs_budget, memory, memory_budget
from .perplexity import Perplexity, check_length, parameter_count, perplexity, windows
from .speed import Speed, speed
from .table import Table, as_json, measured_of, shown, table
from .timing import latency, latency_budget
from .zero_shot import PAPER_TASKS, ZeroShot, zero_shot

__all__ = [
    "PAPER_TASKS",
    "PROMPTS",
    "Evaluation",
    "Perplexity",
    "Speed",
    "Table",
    "Wanted",
    "ZeroShot",
    "as_json",
    "check_length",
    "compare",
    "evaluate",
    "latency",
    "latency_budget",
    "macs",
    "macs_budget",
    "measured_of",
    "memory",
    "memory_budget",
    "pad_id",
    "parameter_count",
    "perplexity",
    "shown",
    "speed",
    "table",
    "windows",
    "zero_shot",
]

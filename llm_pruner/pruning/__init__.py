"""Pruning as a run: arguments, presets, planning, and what the run's folder holds."""

from .arguments import PruneArguments
from .planning import Stopwatch, make_plan
from .run import keeping_model, prune

__all__ = ["PruneArguments", "Stopwatch", "keeping_model", "make_plan", "prune"]

"""Surgery: carrying out a plan."""

from .apply import EquivalenceReport, Place, apply, in_memory, verify
from .biases import with_biases
from .compensate import METHODS, MIN_SAMPLES, CompensationReport, compensate
from .config_solver import skeleton
from .heterogeneous import install

__all__ = [
    "METHODS",
    "MIN_SAMPLES",
    "CompensationReport",
    "EquivalenceReport",
    "Place",
    "apply",
    "compensate",
    "in_memory",
    "install",
    "skeleton",
    "verify",
    "with_biases",
]

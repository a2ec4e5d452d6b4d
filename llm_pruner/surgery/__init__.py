"""Surgery: carrying out a plan."""

from ..heterogeneous import install
from .apply import EquivalenceReport, Place, apply, in_memory, verify
from .biases import with_biases
from .compensate import METHODS, MIN_SAMPLES, CompensationReport, compensate
from .config_solver import skeleton
from .tokens import ids_in
from .uniform import to_uniform

__all__ = [
    "METHODS",
    "MIN_SAMPLES",
    "CompensationReport",
    "EquivalenceReport",
    "Place",
    "apply",
    "compensate",
    "ids_in",
    "in_memory",
    "install",
    "skeleton",
    "to_uniform",
    "verify",
    "with_biases",
]

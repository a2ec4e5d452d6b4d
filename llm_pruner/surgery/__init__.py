"""Surgery: carrying out a plan."""

from .apply import EquivalenceReport, Place, apply, in_memory, verify
from .compensate import CompensationReport, compensate
from .config_solver import skeleton
from .heterogeneous import install

__all__ = [
    "CompensationReport",
    "EquivalenceReport",
    "Place",
    "apply",
    "compensate",
    "in_memory",
    "install",
    "skeleton",
    "verify",
]

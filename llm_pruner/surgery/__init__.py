"""Surgery: carrying out a plan."""

from .apply import EquivalenceReport, apply, verify
from .compensate import CompensationReport, compensate
from .heterogeneous import install

__all__ = ["CompensationReport", "EquivalenceReport", "apply", "compensate", "install", "verify"]

"""Surgery: carrying out a plan."""

from .apply import EquivalenceReport, apply, verify
from .heterogeneous import install

__all__ = ["EquivalenceReport", "apply", "install", "verify"]

"""Selection: how much goes, and which indices."""

from .plan import Choice, PruningPlan
from .policies import first_layers, lifted, removable, select

__all__ = ["Choice", "PruningPlan", "first_layers", "lifted", "removable", "select"]

"""Selection: how much goes, and which indices."""

from .budgets import BYTES, COUNTS, Budget
from .plan import Choice, PruningPlan
from .policies import NORMALIZERS, first_layers, lifted, removable, select

__all__ = [
    "BYTES",
    "COUNTS",
    "NORMALIZERS",
    "Budget",
    "Choice",
    "PruningPlan",
    "first_layers",
    "lifted",
    "removable",
    "select",
]

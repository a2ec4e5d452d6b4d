"""Selection: how much goes, and which indices."""

from .budgets import BYTES, COUNTS, Budget, NothingRemoved, NotMet, parameter_budget, parameters
from .compose import composed
from .plan import Choice, PruningPlan, renamed
from .policies import NORMALIZERS, removable
from .select import lifted, select

__all__ = [
    "BYTES",
    "COUNTS",
    "NORMALIZERS",
    "Budget",
    "Choice",
    "NotMet",
    "NothingRemoved",
    "PruningPlan",
    "composed",
    "lifted",
    "parameter_budget",
    "parameters",
    "removable",
    "renamed",
    "select",
]

"""Estimation: what each index of each unit is worth."""

from .aggregate import AGGREGATIONS, SCORES_FILE, Scores
from .depth import BY_POSITION, STRATEGIES
from .score import CRITERIA, NEED_CALIBRATION, OF_WEIGHTS, score
from .taylor import VARIANTS

__all__ = [
    "AGGREGATIONS",
    "BY_POSITION",
    "CRITERIA",
    "NEED_CALIBRATION",
    "OF_WEIGHTS",
    "SCORES_FILE",
    "STRATEGIES",
    "VARIANTS",
    "Scores",
    "score",
]

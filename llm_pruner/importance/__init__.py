"""Estimation: what each index of each unit is worth."""

from .aggregate import AGGREGATIONS, SCORES_FILE, Scores
from .depth import BY_POSITION, STRATEGIES
from .score import CRITERIA, NEED_CALIBRATION, calibration_of, score
from .taylor import VARIANTS

__all__ = [
    "AGGREGATIONS",
    "BY_POSITION",
    "CRITERIA",
    "NEED_CALIBRATION",
    "SCORES_FILE",
    "STRATEGIES",
    "VARIANTS",
    "Scores",
    "calibration_of",
    "score",
]

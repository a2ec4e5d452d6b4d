"""Estimation: what each index of each unit is worth."""

from .aggregate import AGGREGATIONS, SCORES_FILE, Scores
from .score import CRITERIA, NEED_CALIBRATION, score
from .taylor import VARIANTS

__all__ = ["AGGREGATIONS", "CRITERIA", "NEED_CALIBRATION", "SCORES_FILE", "VARIANTS", "Scores", "score"]

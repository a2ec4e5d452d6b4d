"""Warn if a model is measured on a text that it was also calibrated or trained on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..checkpoint.locate import PLAN_FILE
from ..data import calibration_sources
from ..logs import log
from ..media import is_media
from ..selection.plan import PruningPlan

# Where plans note them.
CALIBRATED_ON = "calibration"
TRAINED_ON = "trained_on"


def sources_of(plan: PruningPlan) -> set[str]:
    """Return the texts that a plan's model was calibrated and trained on, by the names that the flags gave."""
    calibrated, trained = plan.settings.get(CALIBRATED_ON), plan.settings.get(TRAINED_ON)
    calibrated_on = calibration_sources(str(calibrated)) if calibrated else ()
    return {source.name for source in calibrated_on} | {str(name) for name in (trained or ())}


def warn_of_shared_texts(sources: Iterable[str], measured_on: Iterable[str], model: str = "the pruned model") -> None:
    """Warn for each text that is also a source of the model's calibration or training."""
    for text in measured_on:
        if text in sources and not is_media(text):  # of a folder, other files are measured on
            log.warning(
                "perplexity on %s flatters %s, calibrated or trained on the same source: measure on another text",
                text,
                model,
            )


def warn_for_models(models: Iterable[str], measured_on: Iterable[str]) -> None:
    """Warn as :func:`warn_of_shared_texts` for every model whose folder holds a plan."""
    for model in models:
        file = Path(model).expanduser() / PLAN_FILE
        if file.is_file():
            warn_of_shared_texts(sources_of(PruningPlan.load(file)), measured_on, model)

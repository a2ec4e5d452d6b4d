"""Send tokens to fewer experts within a run, and measure the effect by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from ..errors import PrunerError
from ..logs import log
from ..surgery.per_token import EXPERTS_PER_TOKEN, experts_per_token, with_experts_per_token
from .settings import ExpertSettings

Measure = Callable[[PreTrainedModel, str], dict[str, Any]]


def send_to_fewer(
    settings: ExpertSettings, model: PreTrainedModel, metrics: dict[str, Any], measure: Measure
) -> PreTrainedModel:
    """Return the model with as many experts per token as the settings say; measure it into the metrics.

    Args:
        measure: takes the model and a phrase that says when it is measured.
    """
    if settings.per_token is None:
        return model
    before, routed = experts_per_token(model), routed_to_fewer(settings, model)
    log.info("experts per token: %d -> %d", before, settings.per_token)
    record = {"before": before, "after": settings.per_token}
    metrics[EXPERTS_PER_TOKEN] = record | measure(routed, f"with {settings.per_token} experts per token")
    return routed


def routed_to_fewer(settings: ExpertSettings, model: PreTrainedModel) -> PreTrainedModel:
    """Return the model, on the same weights, with as many experts per token as the settings say, if they do.

    Raises:
        PrunerError: the model cannot have that number, or has it already.
    """
    if settings.per_token is None:
        return model
    routed = with_experts_per_token(model, settings.per_token)
    if routed is model:
        raise PrunerError(f"--experts_per_token {settings.per_token}: the model has that number already: give less")
    return routed

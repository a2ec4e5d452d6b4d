"""Mend a pruned model within its run: rescaled norms and compensation, recorded in plan and metrics."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..data import self_calibration
from ..errors import PrunerError
from ..logs import log
from ..models.inputs import Inputs, ModelInputs
from ..refit.biases import with_biases
from ..refit.compensate import CompensationReport, compensate
from ..refit.norms import rescale_norms
from ..selection.plan import PruningPlan
from .context import Planning
from .planning import PlannedModel
from .refit_record import RefitRecord


def mend(planning: Planning, model: PreTrainedModel, planned: PlannedModel) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Rescale norms and compensate as the settings say; return the mended model and a record for the metrics.

    ``plan.settings["refit"]`` records what was done, so that applying the plan can repeat it.
    """
    settings, pruned, plan, ids = planning.settings, planned.pruned, planned.plan, planning.ids
    record: dict[str, Any] = {}
    refit = RefitRecord(calibration=settings.calibration, seed=settings.seed)
    if ids is None:
        return pruned, record
    if settings.refit.rescale_norms:
        with planning.clock("rescale_norms"):
            record["norm_factors"] = rescale_norms(model, pruned, plan, ids)
        refit = replace(refit, rescale_norms=True)
    if settings.refit.compensation != "none":
        with planning.clock("compensate"):
            pruned, record["compensation"] = _compensate(planning, model, planned, ids)
        if "none" not in record["compensation"]:
            own = record["compensation"]["self_samples"]
            refit = replace(refit, compensation=settings.refit.compensation, self_samples=own)
    if refit.does_anything:
        plan.settings["refit"] = asdict(refit)
    return pruned, record


def _compensate(
    planning: Planning, model: PreTrainedModel, planned: PlannedModel, ids: Inputs
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the compensated model and a record of it.

    A model that cannot be compensated is left alone unless the user asked for it.
    """
    refit, pruned, own = planning.settings.refit, planned.pruned, 0
    try:
        if refit.self_samples and (refit.self_samples_required or not planning.settings.model.offload):
            ids, own = _with_self_samples(planning, model, ids)
        pruned, report = compensate_plan(model, pruned, planned.plan, ids, method=refit.compensation)
    except PrunerError as error:
        if refit.required:
            raise
        log.info("no compensation: %s", error)
        return planned.pruned, {"none": str(error)}
    moved = sum(layer.ridge is not None for layer in report.layers)
    scaled = "" if report.temperature is None else f", logits scaled by {report.temperature}"
    if report.layers:
        log.info("compensation moved %d of %d projections%s", moved, len(report.layers), scaled)
    else:
        log.info(
            "no projection was refitted: the layers of %s change what their projections write before they add it%s",
            type(model).__name__,
            scaled,
        )
    return pruned, asdict(report) | {"self_samples": own}


def compensate_plan(
    model: PreTrainedModel, pruned: PreTrainedModel, plan: PruningPlan, ids: Inputs, *, method: str
) -> tuple[PreTrainedModel, CompensationReport]:
    """Compensate a pruned model; return it, with biases added if the method needs them.

    Raises:
        PrunerError: as :func:`llm_pruner.compensate`.
    """
    if method == "bias":
        pruned = with_biases(pruned, ids)
    kept = next((kept.tolist() for kept in plan.layers.values()), None)
    return pruned, compensate(model, pruned, ids, method, kept=kept)


def _with_self_samples(planning: Planning, model: PreTrainedModel, ids: Inputs) -> tuple[Inputs, int]:
    """Return the calibration set, with self-written samples in front if the model can write, and their number."""
    if isinstance(ids, ModelInputs):
        return ids, 0
    settings = planning.settings
    try:
        own = self_calibration(model, ids, settings.refit.self_samples, settings.seed, leading=planning.leading)
    except PrunerError as error:
        if settings.refit.self_samples_required:  # the user asked for them
            raise
        log.info("compensating without self-written samples: %s", error)
        return ids, 0
    log.info("compensating on %d samples, %d of them the model's own", len(ids) + len(own), len(own))
    return torch.cat([own, ids]), len(own)

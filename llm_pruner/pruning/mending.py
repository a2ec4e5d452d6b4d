"""Mend a pruned model within its run: rescaled norms, compensation and training, recorded in plan and metrics."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..choices import SELF
from ..data import calibration_sources, self_calibration
from ..errors import PrunerError
from ..logs import log
from ..models.inputs import Inputs, ModelInputs
from ..models.processes import from_first
from ..refit.biases import with_biases
from ..refit.budget import Budget
from ..refit.compensate import CompensationReport, compensate
from ..refit.methods import train
from ..refit.norms import rescale_norms
from ..selection.plan import PruningPlan
from ..unfinished import NOTHING_KEPT, Unfinished
from .calibration import calibration_set
from .context import Planning
from .planning import PlannedModel
from .refit_record import RefitRecord
from .settings import CalibrationSettings

MOST_TOKENS = 2**22  # of text that a training without a token budget reads


def mend(
    planning: Planning,
    model: PreTrainedModel,
    planned: PlannedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Rescale norms and refit as the settings say; return the mended model and a record for the metrics.

    ``plan.settings["refit"]`` records what was done, so that applying the plan can repeat it.
    """
    settings, pruned, plan, ids = planning.settings, planned.pruned, planned.plan, planning.ids
    record: dict[str, Any] = {}
    refit = RefitRecord(calibration=settings.calibration, seed=settings.seed, narrow=settings.model.narrow)
    if ids is None:
        return pruned, record
    if settings.refit.rescale_norms:
        with planning.clock("rescale_norms"):
            record["norm_factors"] = rescale_norms(model, pruned, plan, ids)
        refit = replace(refit, rescale_norms=True)
    text = ids
    if settings.refit.needs_text:
        with planning.clock("self_samples"), planning.arithmetic():
            text, own = _with_self_samples(planning, model, ids)
        refit = replace(refit, self_samples=own)
    if settings.refit.compensation != "none":
        with planning.clock("compensate"), planning.arithmetic():
            pruned, record["compensation"] = _compensate(planning, model, planned, text)
        if "none" not in record["compensation"]:
            record["compensation"]["self_samples"] = refit.self_samples
            refit = replace(refit, compensation=settings.refit.compensation)
    if settings.refit.training != "none":
        with planning.clock("refit"):
            record["refit"] = _train(planning, model, pruned, plan=plan, text=text, tokenizer=tokenizer)
        if "none" not in record["refit"]:
            done = {name: record["refit"][name] for name in ("training_samples", "training_tokens")}
            refit = replace(refit, training=settings.refit.training, **done)
    if refit.does_anything:
        plan.settings["refit"] = asdict(refit)
    return pruned, record


def _compensate(
    planning: Planning, model: PreTrainedModel, planned: PlannedModel, text: Inputs
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the compensated model and a record of it.

    A model that cannot be compensated is left alone unless the user asked for it.
    """
    refit, pruned, plan = planning.settings.refit, planned.pruned, planned.plan
    unfinished = planning.unfinished("closed-form", refit.compensation, refit.rescale_norms, plan=plan, text=text)
    try:
        pruned, report = compensate_plan(model, pruned, plan, text, method=refit.compensation, unfinished=unfinished)
    except PrunerError as error:
        if refit.required and refit.training == "none":
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
    return pruned, asdict(report)


def _train(
    planning: Planning,
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    *,
    plan: PruningPlan,
    text: Inputs,
    tokenizer: PreTrainedTokenizerBase | None,
) -> dict[str, Any]:
    """Train the pruned model as the settings say; return a record of the training.

    A model that cannot be trained is left alone unless the user asked for it.
    """
    settings, refit = planning.settings, planning.settings.refit
    assert refit.budget is not None
    try:
        if refit.training != "blocks" and (settings.model.offload or settings.model.device_map):
            raise PrunerError(
                f"--refit {refit.training} needs all weights on one device, and the model is offloaded or spread: use "
                "--refit blocks"
            )
        samples = training_samples(refit.training, refit.budget, text)
        text = training_text(settings.calibration, tokenizer, model, samples=samples, seed=settings.seed, text=text)
        depends = [refit.compensation, refit.rescale_norms, refit.training, asdict(refit.budget), settings.seed]
        unfinished = planning.unfinished("training", *depends, plan=plan, text=text)
        report = train(
            model,
            pruned,
            text,
            refit.training,
            plan=plan,
            budget=refit.budget,
            seed=settings.seed,
            unfinished=unfinished,
        )
    except PrunerError as error:
        if refit.required:
            raise
        log.info("no training: %s", error)
        return {"none": str(error)}
    log.info("%s", report.summary())
    tokens = refit.budget.tokens if refit.budget.minutes is None else report.tokens
    return asdict(report) | {"training_samples": samples, "training_tokens": tokens}


def training_samples(training: str, budget: Budget, text: Inputs) -> int:
    """Return how many samples a training reads: those at hand, and as many as its budget can read.

    A reconstruction reads those at hand: it has hidden states of all of them in memory.
    """
    if training == "blocks" or not isinstance(text, torch.Tensor):
        return len(text)
    tokens = MOST_TOKENS if budget.tokens is None else min(budget.tokens, MOST_TOKENS)
    return max(len(text), tokens // text.shape[1])


def training_text(
    calibration: CalibrationSettings,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    *,
    samples: int,
    seed: int,
    text: Inputs,
) -> Inputs:
    """Return the samples at hand and further ones of the calibration text, so many in all where the text has them.

    A text that the model writes itself is not continued: writing takes longer than reading it again.
    """
    drawn = calibration.samples
    if not isinstance(text, torch.Tensor) or samples <= len(text) or _written_share(calibration):
        return text
    more = replace(calibration, samples=drawn + samples - len(text), fewer_samples=True)
    every, known = calibration_set(more, tokenizer, model, seed), {*map(tuple, text.tolist())}
    assert isinstance(every, torch.Tensor)
    # Of several texts, more samples are mixed otherwise, so that those at hand need not be the first.
    is_further = torch.tensor([tuple(sample) not in known for sample in every.tolist()])
    return torch.cat([text, every[is_further]])


def compensate_plan(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    plan: PruningPlan,
    ids: Inputs,
    *,
    method: str,
    unfinished: Unfinished = NOTHING_KEPT,
) -> tuple[PreTrainedModel, CompensationReport]:
    """Compensate a pruned model; return it, with biases added if the method needs them.

    Raises:
        PrunerError: as :func:`llm_pruner.compensate`.
    """
    if method == "bias":
        pruned = with_biases(pruned, ids)
    kept = {path: layers.tolist() for path, layers in plan.layers.items()}
    return pruned, compensate(model, pruned, ids, method, kept=kept, unfinished=unfinished)


def _with_self_samples(planning: Planning, model: PreTrainedModel, ids: Inputs) -> tuple[Inputs, int]:
    """Return the calibration set, with self-written samples in front if the model can write, and their number.

    A model that wrote its calibration set writes as much again at least, since no further text is at hand.
    """
    settings = planning.settings
    refit = settings.refit
    if isinstance(ids, ModelInputs):
        return ids, 0
    samples = refit.self_samples
    if not refit.self_samples_required:
        samples = max(samples, round(len(ids) * _written_share(settings.calibration)))
        if settings.model.offload:  # too slow
            samples = 0
    if not samples:
        return ids, 0
    unfinished = planning.unfinished("self-samples", samples, settings.seed, planning.leading)
    if kept := unfinished.read():
        own = kept.tensors["ids"]
    else:
        try:
            own = from_first(self_calibration(model, ids, samples, settings.seed, leading=planning.leading))
        except PrunerError as error:
            if refit.self_samples_required:  # the user asked for them
                raise
            log.info("compensating without self-written samples: %s", error)
            return ids, 0
        unfinished.write({"ids": own})
    log.info("compensating on %d samples, %d of them the model's own", len(ids) + len(own), len(own))
    return torch.cat([own, ids]), len(own)


def _written_share(calibration: CalibrationSettings) -> float:
    """Return the share of the calibration set that the model writes itself."""
    return sum(source.share for source in calibration_sources(calibration.dataset) if source.name == SELF)

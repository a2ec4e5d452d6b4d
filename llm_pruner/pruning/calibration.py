"""Choose and draw the calibration set of a run."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..choices import GENERAL, SELF, SYNTHETIC
from ..corpora import HUB, documents
from ..data import calibration, self_calibration
from ..errors import PrunerError
from ..logs import log
from ..media import describe, is_media, media_inputs
from ..models.generate import leading_tokens
from ..models.inputs import Inputs, needed_inputs, reads_text_only
from ..models.processes import from_first
from ..models.running import context_length
from ..progress import Step
from .settings import CalibrationSettings


def available_text(settings: CalibrationSettings, model: PreTrainedModel, offload: bool = False) -> CalibrationSettings:
    """Return settings with a text that is available, in samples that fit the model's context; log a replacement.

    Only a text that the user did not name is replaced. If the hub cannot be reached, the model writes the text itself.
    If the model cannot write, or is offloaded, so that each token would take a pass through its files, an embedded text
    is used.
    """
    if not (reads_text_only(model) and settings.towers == "language"):
        return _available_media(settings, model)
    if is_media(settings.dataset):
        name = type(model).__name__
        raise PrunerError(f"--calib_dataset {settings.dataset} has no text, and {name} is calibrated on text")
    if settings.shorter_samples:
        settings = replace(settings, tokens=min(settings.tokens, context_length(model) or 2**31))
    if not settings.replaceable:
        return settings
    dataset = settings.dataset
    if dataset in HUB and not _is_reachable(dataset):
        log.info("calibration text: %s cannot be reached; the model writes its own instead", dataset)
        dataset = SELF
    if dataset == SELF and (reason := _why_not_self(model, offload)):
        log.info("calibration text: the embedded text %s, since %s", GENERAL, reason)
        dataset = GENERAL
    return replace(settings, dataset=dataset, replaceable=False)


def _available_media(settings: CalibrationSettings, model: PreTrainedModel) -> CalibrationSettings:
    """Return settings whose data set is of images or sounds: noise, unless the user named one.

    Raises:
        PrunerError: the user named a text.
    """
    dataset = SYNTHETIC if settings.replaceable else settings.dataset
    if not is_media(dataset):
        raise PrunerError(
            f"--calib_dataset {dataset} is a text, and {type(model).__name__} is calibrated on "
            f"{' and '.join(needed_inputs(model))}: name a folder of images or .wav files, or {SYNTHETIC}"
        )
    return replace(settings, dataset=dataset, replaceable=False)


def _is_reachable(dataset: str) -> bool:
    try:
        next(documents(dataset, most=1), None)
    except PrunerError:
        return False
    return True


def _why_not_self(model: PreTrainedModel, offload: bool) -> str:
    """Return why a model cannot write its calibration text, "" if two tokens on trial show that it can."""
    if offload:
        return "an offloaded model writes too slowly"
    try:
        self_calibration(model, torch.zeros(1, 2, dtype=torch.long), samples=1)
    except PrunerError as error:
        return str(error)
    return ""


def leading_count(settings: CalibrationSettings, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Return the number of tokens that every sample begins with because the tokenizer puts them before a text."""
    return len(leading_tokens(tokenizer)) if settings.bos and tokenizer is not None else 0


def calibration_set(
    settings: CalibrationSettings, tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel, seed: int = 0
) -> Inputs:
    """Return the calibration set: LongTensor ``[samples, tokens]``, or what a processor makes of images or sounds.

    Args:
        model: writes the text if ``settings.dataset`` is ``self``.
        seed: of that text, where the settings have none.

    Raises:
        PrunerError: the text is too short for the samples that were asked for, or the model cannot write.
    """
    samples, tokens = settings.samples, settings.tokens
    if is_media(settings.dataset):
        with Step("reading images or sounds"):
            inputs = media_inputs(model, settings.dataset, "train", samples, seed=settings.seed or seed)
        log.info("calibration: %d samples of %s", len(inputs), describe(settings.dataset))
        return inputs
    assert tokenizer is not None
    origin = "written by the model itself" if settings.dataset == SELF else f"from {settings.dataset}"
    log.info("calibration: %d samples of %d tokens, %s", samples, tokens, origin)
    ids = calibration(
        settings.dataset,
        tokenizer,
        samples,
        tokens,
        seed=settings.seed,
        fewer=settings.fewer_samples,
        bos=settings.bos,
        packed=settings.packed,
        model=model,
        self_seed=seed,
    )
    from_first(ids)
    if len(ids) < samples:
        log.info("the calibration text gives %d samples of %d tokens, not %d", len(ids), tokens, samples)
    return ids

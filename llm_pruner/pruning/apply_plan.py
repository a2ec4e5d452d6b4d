"""Apply a plan to a checkpoint: the run behind ``llm-pruner apply``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checkpoint.apply_files import apply_to_files
from ..checkpoint.arguments import ApplyArguments
from ..checkpoint.card import write_card
from ..checkpoint.integrity import check
from ..checkpoint.load import load_with_tokenizer
from ..checkpoint.save import write_checkpoint
from ..data import self_calibration
from ..errors import PrunerError
from ..files import complete_folder
from ..logs import log
from ..refit.compensate import METHODS
from ..refit.norms import rescale_norms
from ..selection.plan import PruningPlan
from ..surgery.apply import apply
from .mending import calibration_set, compensate_plan
from .settings import CalibrationSettings


@dataclass(frozen=True, kw_only=True)
class RecordedRefit:
    """Refit of a run, as its plan records it.

    Attributes:
        calibration: calibration set.
        compensation: method, or ``none``.
        self_samples: samples that the model writes itself, in front of the others.
        seed: seed of these.
        rescale_norms: rescale norms before the compensation.
    """

    calibration: CalibrationSettings
    compensation: str = "none"
    self_samples: int = 0
    seed: int = 0
    rescale_norms: bool = False

    @classmethod
    def of(cls, record: Any) -> RecordedRefit:
        """Read the record in a plan's settings.

        Raises:
            PrunerError: the record is missing or damaged.
        """
        if record is None:
            raise PrunerError("the plan's run was not refitted: leave out --refit")
        try:
            calibration = CalibrationSettings(**record["calibration"])
            refit = cls(**{**record, "calibration": calibration})
            numbers = (refit.self_samples, refit.seed, calibration.samples, calibration.tokens)
        except (TypeError, KeyError) as error:
            raise PrunerError(f"the plan's record of its refit is damaged: {error}") from error
        if not all(type(n) is int for n in numbers) or refit.compensation not in (*METHODS, "none"):
            raise PrunerError(f"the plan's record of its refit is damaged: {record}")
        return refit


def apply_plan(arguments: ApplyArguments) -> Path:
    """Run ``llm-pruner apply``: cut the files of a checkpoint by a plan; print and return the new folder.

    Raises:
        PrunerError: the plan is for another model or records no refit to repeat, or a file is missing or damaged.
    """
    arguments.check()
    plan = PruningPlan.load(arguments.plan, arguments.verify)
    if arguments.refit:
        folder = _apply_and_refit(plan, arguments)
    else:
        trust = arguments.trust_remote_code
        folder = apply_to_files(plan, arguments.model, arguments.output, trust, standalone=arguments.standalone)
    if arguments.verify:
        check(folder, arguments.trust_remote_code)
    print(folder)
    return folder


def _apply_and_refit(plan: PruningPlan, arguments: ApplyArguments) -> Path:
    """Load the model, apply the plan, repeat the recorded refit and save."""
    refit = RecordedRefit.of(plan.settings.get("refit"))
    if arguments.calib_dataset is not None:
        refit = replace(refit, calibration=replace(refit.calibration, dataset=arguments.calib_dataset))
    settings = {"base_model": arguments.model, **plan.settings} | {"refit": _record(plan.settings["refit"], refit)}
    settings.pop("without_refit", None)
    plan = replace(plan, settings=settings)
    target = Path(arguments.output).expanduser()
    with complete_folder(target, owned_if="config.json", reads=arguments.model) as folder:
        model, tokenizer = load_with_tokenizer(arguments.model, trust_remote_code=arguments.trust_remote_code)
        calibration = calibration_set(refit.calibration, tokenizer)
        pruned = repeat_refit(model, apply(model, plan), plan, calibration, refit=refit)
        write_checkpoint(pruned, tokenizer, folder, plan, standalone=arguments.standalone)
        write_card(pruned.config, folder, plan, target.name)
    return target


def _record(record: Mapping[str, Any], refit: RecordedRefit) -> dict[str, Any]:
    return {**record, "calibration": {**record["calibration"], "dataset": refit.calibration.dataset}}


def repeat_refit(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    plan: PruningPlan,
    calibration: torch.Tensor,
    *,
    refit: RecordedRefit,
) -> PreTrainedModel:
    """Rescale norms and compensate as a run did; return the refitted model.

    Args:
        calibration: LongTensor ``[samples, tokens]``, without the samples that the model writes itself.

    Raises:
        PrunerError: as :func:`llm_pruner.compensate`.
    """
    if refit.rescale_norms:
        rescale_norms(model, pruned, plan, calibration)
    if refit.compensation != "none":
        if refit.self_samples:
            own = self_calibration(model, calibration, refit.self_samples, refit.seed)
            calibration = torch.cat([own, calibration])
        pruned, _ = compensate_plan(model, pruned, plan, calibration, method=refit.compensation)
    log.info("refitted again: %s on %d samples of %d tokens", refit.compensation, *calibration.shape)
    return pruned

"""Refuse models, plans, texts and shapes that ``prune`` and ``apply`` cannot use, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedConfig

from ..checkpoint.arguments import ApplyArguments
from ..checkpoint.checking import check_model
from ..checkpoint.config import meta_model
from ..checkpoint.locate import locate
from ..choices import SELF
from ..data import check_text
from ..errors import PrunerError
from ..files import check_file, check_folder
from ..graph.tracer import TraceError
from ..graph.units import trace
from ..inputs import InputCheck
from ..media import check_dataset
from ..models.running import stored_tensors
from ..selection.plan import PruningPlan
from ..surgery.slicing import check_fits
from .arguments import PruneArguments
from .context import Planning
from .planning import check_plan, needs_calibration, without_scores
from .refit_record import RefitRecord
from .settings import PruneSettings, resolve_settings


def check_prune_inputs(arguments: PruneArguments, check: InputCheck) -> None:
    """Refuse what ``llm-pruner prune`` cannot use; its own first step refuses folders that it cannot write."""
    settings = resolve_settings(arguments)
    config = None
    if not check.skips(settings.model.name):
        with check.flag("model", settings.model.name):
            config = check_model(
                settings.model.name,
                settings.model.trust_remote_code,
                tokenizer=not settings.model.offload,
                task=settings.model.task,
            )
    if config is not None:
        _check_against_config(config, settings)
    calibrates = needs_calibration(settings) or settings.refit.compensation != "none"
    if calibrates and not settings.calibration.replaceable and settings.calibration.dataset != SELF:
        with check.flag("calib_dataset", settings.calibration.dataset):
            check_dataset(settings.calibration.dataset)
    for name in settings.evaluation.datasets:
        with check.flag("eval_datasets", name):
            check_dataset(name, "test")
    if settings.scoring.cache is not None:
        with check.flag("score_cache", settings.scoring.cache):
            check_file(settings.scoring.cache / "scores")


def _check_against_config(config: PreTrainedConfig, settings: PruneSettings) -> None:
    """Refuse layers, widths, shapes and targets that the model cannot have, if any are named."""
    widths = settings.widths
    ranges = any(end is not None for ends in widths.ranges.values() for end in ends)
    if not (settings.layers.any or settings.shape or settings.budget or widths.kinds or widths.uniform or ranges):
        return
    trust_remote_code = settings.model.trust_remote_code
    settings = without_scores(settings)
    if settings.budget is not None and settings.budget.kind == "target_latency":
        settings = replace(settings, budget=None)  # only timing tells
    model = meta_model(config, trust_remote_code)
    try:
        trace(model)
    except TraceError:
        return  # the model can only be traced on its weights
    check_plan(Planning(settings=settings), model)


def check_apply_inputs(arguments: ApplyArguments, check: InputCheck) -> None:
    """Refuse what ``llm-pruner apply`` cannot use."""
    plan = None
    if not check.skips(arguments.plan):
        with check.flag("plan", arguments.plan):
            plan = PruningPlan.load(arguments.plan, arguments.verify)
    if plan is not None and arguments.refit:
        text = arguments.calib_dataset or RefitRecord.of(plan.settings.get("refit")).calibration.dataset
        if text != SELF:
            with check.flag("calib_dataset", text):
                check_text(text)
    if not check.skips(arguments.model):
        with check.flag("model", arguments.model):
            config = check_model(arguments.model, arguments.trust_remote_code, tokenizer=arguments.refit)
            path, gguf = locate(arguments.model)
            if not arguments.refit and (gguf is not None or not Path(path).is_dir()):
                raise PrunerError("this is not a folder of safetensors files, which apply needs: give one")
            if plan is not None:
                tensors = stored_tensors(meta_model(config, arguments.trust_remote_code))
                check_fits({name: tuple(tensor.shape) for name, tensor in tensors.items()}, plan)
    if not check.skips(arguments.output):
        with check.flag("output", arguments.output):
            check_folder(arguments.output, "config.json", arguments.model)

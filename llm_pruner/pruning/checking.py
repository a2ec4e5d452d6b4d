"""Refuse models, plans, texts and shapes that ``prune`` and ``apply`` cannot use, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoint.arguments import ApplyArguments
from ..checkpoint.blocks import check_dequantize, is_quantized
from ..checkpoint.card import check_repository
from ..checkpoint.checking import check_model, needs_tokenizer
from ..checkpoint.config import meta_model
from ..checkpoint.locate import locate
from ..checkpoint.standalone import check_standalone
from ..choices import SELF, SYNTHETIC
from ..data import calibration_sources, check_calibration_text
from ..errors import PrunerError
from ..files import check_file, check_folder
from ..graph.tracer import TraceError
from ..importance.layers import BY_LOSS, check_strategy
from ..inputs import InputCheck
from ..media import check_can_be_shown, check_dataset, check_media, is_media, media_inputs
from ..models.loss import has_loss
from ..models.skeleton import shapes_of
from ..models.tasks import declared_class
from ..models.towers import reach_towers
from ..selection.plan import PruningPlan
from ..surgery.apply import TOWERS, task_of_plan
from ..surgery.slicing import check_fits
from .arguments import PruneArguments
from .context import Planning
from .planning import check_plan, needs_calibration, without_scores
from .quantized import blocks_for, check_quantized
from .refit_record import RefitRecord
from .settings import PruneSettings, resolve_settings
from .towers import LANGUAGE, check_towers, trace_towers


def check_prune_inputs(arguments: PruneArguments, check: InputCheck) -> None:
    """Refuse what ``llm-pruner prune`` cannot use; its own first step refuses folders that it cannot write."""
    settings = resolve_settings(arguments)
    if settings.output.push_to_hub:
        check_repository(settings.output.push_to_hub)
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
        check_quantized(settings)
        if settings.output.standalone:
            check_standalone(declared_class(config))
        _check_inputs(config, settings)
        _check_towers(config, settings)
        _check_losses(config, settings)
        _check_against_config(config, settings)
    calibrates = needs_calibration(settings) or settings.refit.needs_text
    if calibrates and not settings.calibration.replaceable:
        with check.flag("calib_dataset", settings.calibration.dataset):
            check_calibration(settings.calibration.dataset)
    for name in settings.evaluation.datasets:
        with check.flag("eval_datasets", name):
            check_dataset(name, "test")
    if settings.scoring.cache is not None:
        with check.flag("score_cache", settings.scoring.cache):
            check_file(settings.scoring.cache / "scores")


def check_calibration(dataset: str) -> None:
    """Refuse a calibration set of which a text, or folder of images or sounds, cannot be read or is empty.

    Raises:
        PrunerError: as above, or a proportion is not valid.
    """
    for source in calibration_sources(dataset):
        if is_media(source.name):
            check_media(source.name)
        elif source.name != SELF:
            check_calibration_text(source.name)


def _check_inputs(config: PreTrainedConfig, settings: PruneSettings) -> None:
    """Refuse a model of images or sounds whose inputs nothing tells: its signature, its config or its processor."""
    if not needs_tokenizer(config):
        media_inputs(meta_model(config, settings.model.trust_remote_code), SYNTHETIC, samples=1)


def _check_towers(config: PreTrainedConfig, settings: PruneSettings) -> None:
    """Refuse towers that the model does not have, before it is loaded."""
    if settings.calibration.towers != LANGUAGE:
        check_towers(meta_model(config, settings.model.trust_remote_code), settings.calibration.towers)


def _check_losses(config: PreTrainedConfig, settings: PruneSettings) -> None:
    """Refuse criteria and proportions that compare losses, for a model that has none."""
    layers, proportions = settings.layers, settings.widths.proportions
    measured = bool(proportions) and not all(proportions.values())
    if not measured and (layers.replaceable or layers.criterion not in BY_LOSS):
        return
    model = meta_model(config, settings.model.trust_remote_code)
    if not layers.replaceable:
        check_strategy(model, layers.criterion)
    if measured and not has_loss(model):
        raise PrunerError(
            f"--shares measured: {type(model).__name__} has no loss on a text to measure: give proportions such as "
            "layers=2,neurons=1"
        )


def _check_against_config(config: PreTrainedConfig, settings: PruneSettings) -> None:
    """Refuse layers, widths, shapes and targets that the model cannot have, if any are named."""
    widths = settings.widths
    ranges = any(end is not None for ends in widths.ranges.values() for end in ends)
    named = (settings.layers.any, settings.shape, settings.budget, widths.kinds, widths.uniform, ranges)
    if not any((*named, settings.experts.per_token)):
        return
    trust_remote_code, blocks = settings.model.trust_remote_code, blocks_for(settings)
    settings = without_scores(settings)
    if settings.budget is not None and settings.budget.kind == "target_latency":
        settings = replace(settings, budget=None)  # only timing tells
    model = meta_model(config, trust_remote_code)
    try:
        trace_towers(model, settings.calibration.towers)
    except TraceError:
        return  # the model can only be traced on its weights
    check_plan(Planning(settings=settings, blocks=blocks), model)


def check_apply_inputs(arguments: ApplyArguments, check: InputCheck) -> None:
    """Refuse what ``llm-pruner apply`` cannot use."""
    plan = None
    if not check.skips(arguments.plan):
        with check.flag("plan", arguments.plan):
            plan = PruningPlan.load(arguments.plan, arguments.verify)
    if plan is not None and arguments.refit:
        text = arguments.calib_dataset or RefitRecord.of(plan.settings.get("refit")).calibration.dataset
        with check.flag("calib_dataset", text):
            check_calibration(text)
    if not check.skips(arguments.model):
        with check.flag("model", arguments.model):
            task = arguments.task or (task_of_plan(plan) if plan is not None else None)
            config = check_model(arguments.model, arguments.trust_remote_code, tokenizer=arguments.refit, task=task)
            path, gguf = locate(arguments.model)
            if not arguments.refit and (gguf is not None or not Path(path).is_dir()):
                raise PrunerError("this is not a folder of safetensors files, which apply needs: give one")
            check_dequantize(arguments.model, arguments.dequantize)
            if arguments.standalone:
                check_standalone(declared_class(config))
            if arguments.refit and not arguments.dequantize and is_quantized(arguments.model):
                raise PrunerError(
                    "--refit changes weights, and the model stays quantized: leave it out, or add --dequantize, which "
                    "writes 16 bits"
                )
            if plan is not None:
                _check_plan_fits(meta_model(config, arguments.trust_remote_code), plan)
    if not check.skips(arguments.output):
        with check.flag("output", arguments.output):
            check_folder(arguments.output, "config.json", arguments.model)


def _check_plan_fits(model: PreTrainedModel, plan: PruningPlan) -> None:
    """Refuse a plan for another model, and one that cuts towers which nothing can be shown to."""
    check_fits(shapes_of(model), plan)
    if plan.settings.get(TOWERS) or reach_towers(model, plan.units):
        check_can_be_shown(model)

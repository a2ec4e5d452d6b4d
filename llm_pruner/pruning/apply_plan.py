"""Run ``llm-pruner apply``: apply a plan to a checkpoint."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.apply_files import APPLY_FILE, apply_to_files
from ..checkpoint.arguments import ApplyArguments
from ..checkpoint.card import write_card
from ..checkpoint.integrity import check
from ..checkpoint.load import load, no_tokenizer
from ..checkpoint.next_steps import log_next_steps
from ..checkpoint.save import write_checkpoint
from ..checkpoint.unread import UNREAD, unread_tensors
from ..data import self_calibration
from ..files import complete_folder, folder_for_run, same_folder, strict_json, write_text
from ..logs import log, logging_to
from ..models.arithmetic import narrow_arithmetic
from ..models.blockwise import native_compute
from ..models.inputs import Inputs, reads_text_only
from ..provenance import provenance
from ..refit.budget import Budget
from ..refit.methods import train
from ..refit.norms import rescale_norms
from ..selection.plan import PruningPlan
from ..surgery.apply import TASK, apply, task_of_plan
from ..surgery.per_token import EXPERTS_PER_TOKEN, with_experts_per_token
from .calibration import calibration_set, leading_count
from .mending import compensate_plan, training_text
from .refit_record import RefitRecord


def apply_plan(arguments: ApplyArguments) -> Path:
    """Run ``llm-pruner apply``: cut the files of a checkpoint by a plan; print and return the new folder.

    Raises:
        PrunerError: the plan is for another model or records no refit to repeat, or a file is missing or damaged.
    """
    arguments.check()
    plan = PruningPlan.load(arguments.plan, arguments.verify)
    task = arguments.task or task_of_plan(plan)
    plan.settings |= {TASK: task} if task else {}
    target = Path(arguments.output)
    if not same_folder(target, arguments.model):  # refused below, with that reason
        target = folder_for_run(target, APPLY_FILE, asdict(arguments), named=True)
    record = strict_json({"arguments": asdict(arguments), **provenance()})
    trust = arguments.trust_remote_code
    with logging_to(None):
        if arguments.refit:
            folder = _apply_and_refit(plan, arguments, target, record)
        else:
            folder = apply_to_files(
                plan,
                arguments.model,
                target,
                trust,
                standalone=arguments.standalone,
                task=task,
                record=record,
                dequantize=arguments.dequantize,
            )
        if arguments.verify:
            check(folder, trust)
        log_next_steps(folder, "apply", original=arguments.model, trust_remote_code=trust)
    print(folder)
    return folder


def _apply_and_refit(plan: PruningPlan, arguments: ApplyArguments, target: Path, record: str) -> Path:
    """Load the model, apply the plan, repeat the recorded refit and save."""
    refit = RefitRecord.of(plan.settings.get("refit"))
    if arguments.calib_dataset is not None:
        refit = replace(refit, calibration=replace(refit.calibration, dataset=arguments.calib_dataset))
    settings = {"base_model": arguments.model, **plan.settings} | {"refit": asdict(refit)}
    settings.pop("without_refit", None)
    plan = replace(plan, settings=settings)
    with complete_folder(target, owned_if="config.json", reads=arguments.model) as folder:
        trust = arguments.trust_remote_code
        model, tokenizer = load(arguments.model, trust_remote_code=trust, task=task_of_plan(plan))
        if tokenizer is None and reads_text_only(model):
            raise no_tokenizer(arguments.model)
        if left_out := unread_tensors(model):
            plan.settings[UNREAD] = left_out
        experts = plan.settings.get(EXPERTS_PER_TOKEN)  # the run's calibration text may be written by so many
        writer = model if experts is None else with_experts_per_token(model, experts)
        calibration = calibration_set(refit.calibration, tokenizer, writer, refit.seed)
        pruned = repeat_refit(model, apply(model, plan), plan, calibration, refit=refit, tokenizer=tokenizer)
        write_checkpoint(pruned, tokenizer, folder, plan, standalone=arguments.standalone)
        write_card(pruned.config, folder, plan, target.name)
        write_text(folder / APPLY_FILE, record)
    return target


def repeat_refit(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    plan: PruningPlan,
    calibration: Inputs,
    *,
    refit: RefitRecord,
    tokenizer: PreTrainedTokenizerBase | None,
) -> PreTrainedModel:
    """Rescale norms, compensate and train as a run did; return the refitted model.

    Args:
        calibration: LongTensor ``[samples, tokens]`` or other inputs, without the samples that the model writes itself.

    Raises:
        PrunerError: as :func:`llm_pruner.refit`.
    """
    text = calibration
    if refit.rescale_norms:
        rescale_norms(model, pruned, plan, calibration)
    with narrow_arithmetic(native_compute(model).device) if refit.narrow else nullcontext():
        if refit.self_samples and isinstance(calibration, torch.Tensor):
            leading = leading_count(refit.calibration, tokenizer)
            own = self_calibration(model, calibration, refit.self_samples, refit.seed, leading=leading)
            text = torch.cat([own, calibration])
        if refit.compensation != "none":
            pruned, _ = compensate_plan(model, pruned, plan, text, method=refit.compensation)
    if refit.training != "none":
        samples, tokens = refit.training_samples, refit.training_tokens
        text = training_text(refit.calibration, tokenizer, model, samples=samples, seed=refit.seed, text=text)
        train(model, pruned, text, refit.training, plan=plan, budget=Budget(tokens=tokens), seed=refit.seed)
    methods = [one for one in (refit.compensation, refit.training) if one != "none"]
    log.info("refitted again: %s on %d samples", " and ".join(methods) or "norms", len(text))
    return pruned

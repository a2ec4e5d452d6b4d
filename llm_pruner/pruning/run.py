"""The pruning run behind ``lp.prune``, ``hf_prune.py`` and ``llm-pruner prune``: load, prune, measure, save."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import set_seed  # transformers' own imports peft
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.apply_files import cut_files
from ..checkpoint.card import upload, write_card
from ..checkpoint.config import load_config, meta_model
from ..checkpoint.load import no_tokenizer
from ..checkpoint.locate import PLAN_FILE, locate
from ..checkpoint.next_steps import log_next_steps
from ..checkpoint.on_disk import on_disk
from ..checkpoint.standalone import write_modelling
from ..checkpoint.stored import weights_in
from ..checkpoint.unread import UNREAD, unread_tensors
from ..choices import DEFAULT_MODEL, SYNTHETIC, UNGROUPED
from ..data import calibration_sources
from ..display import amount, html_table
from ..errors import PrunerError
from ..evaluation.shared_texts import CALIBRATED_ON, warn_of_shared_texts
from ..evaluation.similarity import Originals
from ..files import complete_folder, folder_for_run, same_folder, strict_json
from ..flags import check_combinations
from ..importance.scores import SCORES_FILE, Scores
from ..inputs import InputCheck
from ..logs import is_first_process, log, logging_to, started_processes
from ..media import is_media
from ..models.inputs import reads_text_only
from ..models.processes import joined
from ..models.skeleton import parameter_count
from ..peak_memory import PeakMemory, gpu_peak, reset_gpu_peaks
from ..progress import showing, without_bars
from ..provenance import command_line, provenance
from ..refit.compensate import SAMPLES_PER_PASS
from ..selection.plan import PruningPlan
from ..selection.search import ALLOCATION
from ..surgery.apply import TASK, in_memory
from ..surgery.equivalence import verify
from ..unfinished import kept_until_done
from ..version import __version__
from .arguments import PruneArguments
from .calibration import available_text, calibration_set, leading_count
from .checking import check_prune_inputs
from .combinations import REQUIRES_SAVING
from .context import Planning, Progress, Stopwatch
from .evaluation import compare_latency, evaluate_model, evaluation_windows, warn_of_lost_quality
from .fewer_experts import routed_to_fewer, send_to_fewer
from .loading import is_too_large, load_or_reuse
from .measurements import METRICS_FILE, before_and_after
from .mending import mend
from .planning import PlannedModel, log_plan, make_plan, needs_calibration
from .quantized import blocks_for, save_pruned, without_refit
from .settings import EvaluationSettings, OutputSettings, PruneSettings, filled_arguments, resolve_settings
from .towers import LANGUAGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOG_FILE = "prune.log"


@dataclass(frozen=True, kw_only=True, repr=False)
class PruneRun:
    """Result of :func:`prune`.

    Attributes:
        model: pruned model, in eval mode; None if files were cut without loading them.
        tokenizer: tokenizer of the model; None if the original has none.
        plan: plan of the run: the indices that stay.
        metrics: content of ``metrics.json``: parameters, perplexities, seconds, bytes of memory, versions, arguments.
        folder: folder of the run; None if nothing was written.
    """

    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    plan: PruningPlan
    metrics: dict[str, Any]
    folder: Path | None

    def __repr__(self) -> str:
        before, after = (self.metrics[f"parameters_{when}"] for when in ("before", "after"))
        lines = [f"{self.title()}: {amount(before)} -> {amount(after)} parameters ({after / before:.1%})"]
        lines += [f"{name}: {' -> '.join(values)}" for name, *values in before_and_after(self.metrics)[2:]]
        return "\n  ".join([*lines, *([f"folder: {self.folder}"] if self.folder else [])])

    def _repr_html_(self) -> str:
        return html_table(self.title(), before_and_after(self.metrics)) + self.plan._repr_html_()

    def title(self) -> str:
        """Return the first line of the representations."""
        model = f" as {type(self.model).__name__}" if self.model is not None else ""
        return f"PruneRun of {self.metrics['arguments']['model']}{model}"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the share of the indices that each layer keeps, by kind of unit: the plot of the plan.

        Raises:
            PrunerError: matplotlib is not installed.
        """
        return self.plan.plot(ax)


def prune(model: str = DEFAULT_MODEL, *, progress: Progress | None = None, **flags: Any) -> PruneRun:
    """Prune a model by the code path of ``llm-pruner prune``.

    Args:
        model: alias of the embedded model, hub id, folder, or .gguf file.
        progress: called with (stage, done, total) when a stage begins and ends, instead of printed bars.
        **flags: flags of ``llm-pruner prune`` by name, without dashes. With ``output``, the run's folder is written,
            checkpoint included; without it, no file is written.

    Returns:
        The run, with the pruned model.

    Raises:
        PrunerError: a flag is unknown or not valid, ``output`` holds another run, or the run cannot do what is asked.

    Example:
        >>> import llm_pruner as lp
        >>> run = lp.prune("smollm2-135m", pruning_ratio=0.25, pruner_type="l2", compensate="none",
        ...                eval_datasets="")
        >>> sorted(run.plan.units)[0], run.metrics["parameters_after"] < run.metrics["parameters_before"]
        ('model.layers.10.mlp.neurons', True)
    """
    arguments = PruneArguments.of(model=model, **flags)
    check_combinations(arguments, (), REQUIRES_SAVING)
    check_prune_inputs(arguments, InputCheck())
    settings, recorded = resolve_settings(arguments), filled_arguments(arguments)
    with without_bars() if progress else showing():
        if arguments.output is not None or arguments.save_model:
            return execute(settings, recorded, progress)
        with _together(settings):
            return _run_without_folder(settings, recorded, progress)


def run_prune(arguments: PruneArguments) -> Path:
    """Run ``llm-pruner prune``; return the run's folder."""
    run = execute(resolve_settings(arguments), filled_arguments(arguments))
    assert run.folder is not None
    return run.folder


def execute(settings: PruneSettings, arguments: dict[str, Any], progress: Progress | None = None) -> PruneRun:
    """Prune and write the run's folder: checkpoint, plan, ``metrics.json`` and log, complete or not at all.

    Args:
        arguments: recorded in the metrics.

    Raises:
        PrunerError: the folder holds something that the run would remove, or the run cannot do what is asked.
    """
    output = settings.output
    if output.named and same_folder(output.folder, settings.model.name):
        raise PrunerError(f"{output.folder} is the model to be pruned: give another --output")
    with _together(settings):
        if is_first_process():
            return _execute(settings, arguments, progress)
        with logging_to(None, quiet=True):
            return replace(_run_without_folder(settings, arguments), folder=output.folder)


@contextmanager
def _together(settings: PruneSettings) -> Iterator[None]:
    """Run as one of the processes that torchrun started, if it did.

    Raises:
        PrunerError: several processes cannot do what the settings say.
    """
    processes, samples = started_processes(), settings.calibration.samples
    if processes > 1:
        if settings.budget is not None and settings.budget.kind == "target_latency":
            raise PrunerError("--target_latency times one process, and torchrun started several: use --target_params")
        if settings.refit.needs_text and (SAMPLES_PER_PASS % processes or samples % SAMPLES_PER_PASS):
            raise PrunerError(
                f"{processes} processes cannot share {samples} calibration samples equally: start 2, 4 or 8 processes, "
                f"and give --num_examples a multiple of {SAMPLES_PER_PASS}"
            )
    with joined(settings.model.device):
        yield


def _run_without_folder(
    settings: PruneSettings, arguments: dict[str, Any], progress: Progress | None = None
) -> PruneRun:
    """Prune, and leave no file."""
    with tempfile.TemporaryDirectory() as folder:
        set_seed(settings.seed)
        return replace(_run(settings, arguments, Path(folder), Stopwatch(progress)), folder=None)


def _execute(settings: PruneSettings, arguments: dict[str, Any], progress: Progress | None) -> PruneRun:
    output = settings.output
    folder = folder_for_run(output.folder, METRICS_FILE, arguments, named=output.named)
    with (
        complete_folder(folder, owned_if=METRICS_FILE) as temporary,
        logging_to(temporary / LOG_FILE),
        kept_until_done(folder.with_name(f".{folder.name}.unfinished"), fresh=output.fresh) as unfinished,
    ):
        if folder != output.folder:
            log.info("writing to %s: %s holds another run", folder, output.folder)
        log.info("llm-pruner %s: %s", __version__, command_line())
        if not output.save and not arguments["no_save"]:
            log.info("no checkpoint will be kept: add --save_model, or --output FOLDER, to keep it")
        set_seed(settings.seed)
        if started_processes() == 1:  # several would stop at different places
            settings = replace(settings, output=replace(output, unfinished=unfinished))
        run = _run(settings, arguments, temporary, Stopwatch(progress))
        (temporary / METRICS_FILE).write_text(strict_json(run.metrics), encoding="utf-8")
        if output.save:
            config = load_config(str(temporary), settings.model.trust_remote_code)
            write_card(config, temporary, PruningPlan.load(temporary / PLAN_FILE), folder.name, metrics=run.metrics)
    with logging_to(folder / LOG_FILE):
        if output.push_to_hub:
            log.info("pushed to %s", upload(folder, output.push_to_hub))
        log.info("run folder: %s", folder)
        if output.save:
            log_next_steps(
                folder, "prune", original=settings.model.name, trust_remote_code=settings.model.trust_remote_code
            )
    return replace(run, folder=folder)


def _run(settings: PruneSettings, arguments: dict[str, Any], folder: Path, clock: Stopwatch) -> PruneRun:
    offload = settings.model.offload or (not settings.model.device_map and is_too_large(settings.model))
    settings = without_refit(replace(settings, model=replace(settings.model, offload=offload)))
    if not is_first_process():
        settings = replace(settings, evaluation=EvaluationSettings(), output=OutputSettings(folder=folder))
    reset_gpu_peaks()
    with PeakMemory() as memory:
        run = (_cut_files if _works_on_files(settings) else _prune_loaded)(settings, folder, clock)
    on_gpus = gpu_peak()
    record = {
        "seconds": clock.seconds,
        "peak_rss_gib": round(memory.peak / 2**30, 3),
        "peak_cuda_gib": None if on_gpus is None else round(on_gpus / 2**30, 3),
        "arguments": arguments,
        **provenance(settings.seed),
    }
    if UNREAD in run.plan.settings:
        record[UNREAD] = run.plan.settings[UNREAD]
    return replace(run, metrics=run.metrics | record)


def _prune_loaded(settings: PruneSettings, folder: Path, clock: Stopwatch) -> PruneRun:
    with clock("load"):
        model, tokenizer = load_or_reuse(settings.model, folder)
    if tokenizer is None and reads_text_only(model):
        raise no_tokenizer(settings.model.name)
    log.info("loaded %s: %s parameters; preset %s", settings.model.name, f"{parameter_count(model):,}", settings.preset)
    calibrates = needs_calibration(settings) or settings.refit.needs_text
    if calibrates:
        settings = replace(settings, calibration=available_text(settings.calibration, model, settings.model.offload))
        names = [source.name for source in calibration_sources(settings.calibration.dataset)]
        warn_of_shared_texts(names, settings.evaluation.datasets)
    originals, dataset = Originals(), settings.calibration.dataset
    fallback = dataset if calibrates and is_media(dataset) else SYNTHETIC
    windows = evaluation_windows(settings.evaluation, model, tokenizer, originals=originals, fallback=fallback)
    metrics: dict[str, Any] = {"parameters_before": parameter_count(model)}
    measure = partial(evaluate_model, settings, texts=windows, clock=clock, originals=originals)
    metrics["before"] = measure(model, tokenizer, when="before pruning")
    original, model = model, send_to_fewer(settings.experts, model, metrics, lambda m, w: measure(m, tokenizer, when=w))
    if not settings.model.offload and not settings.model.device_map:
        nn.Module.to(model, settings.model.device)  # from where it was measured
    ids = None
    if calibrates:
        with clock("calibration"):
            ids = calibration_set(settings.calibration, tokenizer, model, settings.seed)
    place = on_disk(folder) if settings.model.offload else in_memory
    leading, blocks = leading_count(settings.calibration, tokenizer), blocks_for(settings)
    planning = Planning(settings=settings, ids=ids, leading=leading, clock=clock, place=place, blocks=blocks)
    planned = make_plan(planning, model)
    if ALLOCATION in planned.plan.settings:
        metrics[ALLOCATION] = planned.plan.settings[ALLOCATION]
    if calibrates:
        planned.plan.settings[CALIBRATED_ON] = settings.calibration.dataset
    if left_out := unread_tensors(model):
        planned.plan.settings[UNREAD] = left_out
    log_plan(planned, metrics["parameters_before"])
    metrics |= _check_equivalence(planning, model, planned)
    pruned, refit = mend(planning, original, planned, tokenizer)
    metrics |= refit
    _record_parameters(metrics, parameter_count(pruned))
    if settings.budget is not None and settings.budget.kind == "target_latency":
        with clock("latency"):
            metrics["latency"] = compare_latency(settings.budget, model, pruned)
    _save_plan(settings, planned.plan, planned.scores, folder)
    del model, original
    gc.collect()  # the original is part of reference cycles
    if settings.output.save:
        with clock("save"):
            save_pruned(settings, pruned, tokenizer, folder, plan=planned.plan)
    metrics["after"] = measure(pruned, tokenizer, when="after pruning")
    warn_of_lost_quality(metrics)
    return PruneRun(model=pruned, tokenizer=tokenizer, plan=planned.plan, metrics=metrics, folder=folder)


def _check_equivalence(planning: Planning, model: PreTrainedModel, planned: PlannedModel) -> dict[str, Any]:
    """Compare with the masked original; return a record for the metrics.

    Raises:
        PrunerError: the two differ, and no target shape explains that.
    """
    plan = planned.plan
    if planning.settings.scoring.aggregation == UNGROUPED:
        log.info("mask equivalence does not apply: every weight keeps indices of its own")
        return {}
    flagged = {
        u.kind for u in planned.graph.units if u.name in plan.units and u.flags and u.kind not in ("hidden", "experts")
    }
    if flagged:
        log.info(
            "mask equivalence does not apply: removing %s is not the same as zeroing them", ", ".join(sorted(flagged))
        )
        return {}
    with planning.clock("verify"):
        report = verify(model, planned.pruned, plan)
    if report.equivalent:
        log.info("pruned model equals the masked original (relative difference %.1e)", report.relative)
    elif planning.settings.shape:
        log.info(
            "the config derives constants from its sizes: the model differs from the masked original by %.1e",
            report.relative,
        )
    else:
        raise PrunerError(
            f"the pruned model differs from the masked original by {report.relative:.1e} (relative; "
            f"{report.tolerance:.0e} is rounding): please report the architecture {type(model).__name__}"
        )
    return {"mask_equivalence": {"relative": report.relative, "tolerance": report.tolerance}}


def _record_parameters(metrics: dict[str, Any], after: int) -> None:
    before = metrics["parameters_before"]
    metrics |= {"parameters_after": after, "parameters_ratio": after / before}
    log.info("parameters: %s -> %s (%.4f)", f"{before:,}", f"{after:,}", after / before)


def _works_on_files(settings: PruneSettings) -> bool:
    """Return True if nothing computes with the model, so that its weights can stay in their files."""
    evaluation = settings.evaluation
    evaluates = evaluation.datasets or evaluation.generate_before or evaluation.generate_after
    computes = (
        needs_calibration(settings)
        or settings.widths.iterative_steps > 1
        or settings.widths.generations is not None
        or settings.widths.proportions
        or settings.refit.needs_text
        or settings.calibration.towers != LANGUAGE  # traced on images or sounds, often by weights
    )
    path, gguf = locate(settings.model.name)
    return bool(settings.model.offload and not evaluates and not computes and not gguf and Path(path).is_dir())


def _cut_files(settings: PruneSettings, folder: Path, clock: Stopwatch) -> PruneRun:
    """Score and cut a checkpoint tensor by tensor, without loading it."""
    name, trust = settings.model.name, settings.model.trust_remote_code
    task = settings.model.task
    model = routed_to_fewer(settings.experts, meta_model(load_config(name, trust, task=task), trust))
    weights, blocks = weights_in(name, trust, task=task), blocks_for(settings)
    planned = make_plan(Planning(settings=settings, clock=clock, weights=weights, blocks=blocks), model)
    metrics: dict[str, Any] = {"parameters_before": parameter_count(model)}
    log_plan(planned, metrics["parameters_before"])
    _record_parameters(metrics, parameter_count(planned.pruned))
    log.info("logits were not compared, since nothing was loaded")
    _save_plan(settings, planned.plan, planned.scores, folder)
    if settings.output.save:
        with clock("save"):
            cut_files(planned.plan, name, folder, trust, task=task, dequantize=settings.output.dequantize)
            if settings.output.standalone:
                write_modelling(planned.pruned, folder)
    metrics |= {"before": {"perplexity": {}}, "after": {"perplexity": {}}}
    return PruneRun(model=None, tokenizer=None, plan=planned.plan, metrics=metrics, folder=folder)


def _save_plan(settings: PruneSettings, plan: PruningPlan, scores: Scores | None, folder: Path) -> None:
    """Write the plan, and the scores that it was made by."""
    plan.settings |= {"base_model": settings.model.name, "command": command_line()}
    if settings.shape:
        plan.settings["shape"] = dict(settings.shape)
    if settings.model.task:
        plan.settings[TASK] = settings.model.task
    plan.save(folder / PLAN_FILE)
    if scores is not None:
        scores.save(folder / SCORES_FILE)

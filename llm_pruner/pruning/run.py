"""The pruning run behind ``hf_prune.py`` and ``llm-pruner prune``: load, prune, measure, save."""

from __future__ import annotations

import json
import resource
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..arguments import listed
from ..checkpoint import (
    DTYPES,
    PLAN_FILE,
    cut_files,
    load,
    load_config,
    locate,
    meta_model,
    on_disk,
    upload,
    weights_in,
    write_card,
    write_checkpoint,
    write_modelling,
)
from ..data import calibration, self_calibration, text
from ..errors import PrunerError
from ..evaluation import PROMPTS, check_length, latency, pad_id, parameter_count, perplexity, windows
from ..files import complete_folder, same
from ..graph import computing, context_length, native
from ..importance import SCORES_FILE, Scores
from ..logs import log, logging_to
from ..provenance import provenance
from ..selection import PruningPlan
from ..surgery import compensate, in_memory, rescale_norms, verify, with_biases
from ..version import __version__
from .arguments import PruneArguments
from .planning import Stopwatch, make_plan, needs_calibration

LOG_FILE, METRICS_FILE = "prune.log", "metrics.json"


def prune(args: PruneArguments) -> Path:
    """Run what the arguments say; returns the run's folder, ``prune_log/<name>``.

    The folder holds the checkpoint (with ``--save_model``), the plan, ``metrics.json`` and the log. It appears
    complete or not at all.

    Raises:
        PrunerError: bad arguments or anything else that the user can mend.
    """
    args.check()
    folder = Path(args.output_root) / args.save_ckpt_log_name
    if any(folder.glob("*.safetensors")):
        if not args.save_model:
            raise PrunerError(
                f"{folder} holds a checkpoint, which this run would remove: add --save_model or rename the run"
            )
        if same(folder, args.base_model):
            raise PrunerError(f"{folder} is the model to be pruned: give the run another --save_ckpt_log_name")
    with complete_folder(folder, owned_if=METRICS_FILE) as temporary, logging_to(temporary / LOG_FILE):
        log.info("llm-pruner %s: %s", __version__, shlex.join(sys.argv))
        args.stream = args.stream or (not args.device_map and too_large(args))
        metrics = (_on_files if files_do(args) else _run)(args, temporary)
        (temporary / METRICS_FILE).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        if args.save_model:
            config = load_config(str(temporary), args.trust_remote_code)
            write_card(config, temporary, PruningPlan.load(temporary / PLAN_FILE), folder.name, metrics)
    if args.push_to_hub:
        log.info("pushed to %s", upload(folder, args.push_to_hub))
    log.info("run folder: %s", folder)
    return folder


def _run(args: PruneArguments, folder: Path) -> dict[str, Any]:
    set_seed(args.seed)
    clock = Stopwatch()
    with clock("load"):
        dtype = "float32" if args.dtype == "auto" and args.device == "cpu" and not args.stream else args.dtype
        device = "cpu" if args.stream else args.device
        model, tokenizer = _loaded(args.base_model, dtype, device, args.trust_remote_code, args.device_map)
    log.info("loaded %s: %s parameters; preset %s", args.base_model, f"{parameter_count(model):,}", args.preset)
    if "calib_seq_len" in args.by_preset:
        args.calib_seq_len = min(cast(int, args.calib_seq_len), context_length(model) or 2**31)
    metrics: dict[str, Any] = {"parameters_before": parameter_count(model)}
    evaluation = _evaluation_windows(args, model, tokenizer)
    metrics["before"] = _test("before pruning", args.test_before_train, model, tokenizer, args, evaluation, clock)
    _moved(args, model, args.device)

    ids = None
    if needs_calibration(args) or args.compensate != "none":
        with clock("calibration"):
            ids = calibration_set(args, tokenizer)
    made = make_plan(args, model, ids, clock, on_disk(folder) if args.stream else in_memory)
    plan, pruned = made.plan, made.pruned
    for line in plan.summary().splitlines():
        log.info("%s", line)
    normed = {u.kind for u in made.graph.units if u.name in plan.units and u.flags and u.kind != "hidden"}
    if normed:
        log.info("mask equivalence does not apply: %s are normalised over or scaled by", ", ".join(sorted(normed)))
    else:
        with clock("verify"):
            report = verify(model, pruned, plan)
        metrics["mask_equivalence"] = {"relative": report.relative, "tolerance": report.tolerance}
        if not report.equivalent and args.shape:
            log.info(
                "the config computes something from its sizes: the model differs from the masked original by %.1e",
                report.relative,
            )
        elif not report.equivalent:
            raise PrunerError(
                f"the pruned model differs from the masked original by {report.relative:.1e} (relative; "
                f"{report.tolerance:.0e} is rounding): please report the architecture {type(model).__name__}"
            )
        else:
            log.info("pruned model equals the masked original (relative difference %.1e)", report.relative)
    if args.rescale_norms and ids is not None:
        with clock("rescale_norms"):
            metrics["norm_factors"] = rescale_norms(model, pruned, plan, ids)
    if args.compensate != "none" and ids is not None:
        with clock("compensate"):
            pruned, metrics["compensation"] = _compensated(args, model, pruned, plan, ids)
    metrics["parameters_after"] = parameter_count(pruned)
    metrics["parameters_ratio"] = metrics["parameters_after"] / metrics["parameters_before"]
    log.info(
        "parameters: %s -> %s (%.4f)",
        f"{metrics['parameters_before']:,}",
        f"{metrics['parameters_after']:,}",
        metrics["parameters_ratio"],
    )
    if args.target_latency is not None:
        with clock("latency"):
            metrics["latency"] = _latency(args, model, pruned)
    _keep(args, plan, made.scores, folder)
    del model
    if args.save_model:
        with clock("save"):
            write_checkpoint(pruned, tokenizer, folder, plan, args.standalone)
    metrics["after"] = _test("after pruning", args.test_after_train, pruned, tokenizer, args, evaluation, clock)
    return metrics | _told(args, clock)


_kept: dict[tuple[Any, ...], Any] | None = None  # the model loaded last, while it is kept


@contextmanager
def keeping_model() -> Iterator[None]:
    """Runs inside, one after the other, load a model that they share once: none of them changes it."""
    global _kept
    _kept = {}
    try:
        yield
    finally:
        _kept = None


def _loaded(*how: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, from the arguments of :func:`llm_pruner.load`."""
    if _kept is not None and how in _kept:
        return _kept[how]
    name, dtype, device, trust_remote_code, device_map = how
    if _kept is not None:
        _kept.clear()  # before the next one takes memory
    found = load(name, dtype, device, trust_remote_code, device_map=device_map)
    if _kept is not None:
        _kept[how] = found
    return found


def files_do(args: PruneArguments) -> bool:
    """Whether the weights can stay in their files all along: nothing asked for computes with the model."""
    evaluated = args.eval_datasets.strip() or args.test_before_train or args.test_after_train
    by_weights = args.iterative_steps == 1 and not args.shares and not needs_calibration(args)
    path, gguf = locate(args.base_model)
    return bool(
        args.stream and by_weights and not evaluated and args.compensate == "none" and not gguf and Path(path).is_dir()
    )


def _on_files(args: PruneArguments, folder: Path) -> dict[str, Any]:
    """Score and cut a checkpoint tensor by tensor, without loading it."""
    set_seed(args.seed)
    clock = Stopwatch()
    model = meta_model(load_config(args.base_model, args.trust_remote_code), args.trust_remote_code)
    weights = weights_in(args.base_model, args.trust_remote_code)
    made = make_plan(args, model, None, clock, in_memory, weights)
    plan, pruned = made.plan, made.pruned
    for line in plan.summary().splitlines():
        log.info("%s", line)
    before, after = parameter_count(model), parameter_count(pruned)
    log.info("parameters: %s -> %s (%.4f); no logits compared, since nothing was loaded", before, after, after / before)
    _keep(args, plan, made.scores, folder)
    if args.save_model:
        with clock("save"):
            cut_files(plan, args.base_model, folder, args.trust_remote_code)
            if args.standalone:
                write_modelling(pruned, folder)
    counts = {"parameters_before": before, "parameters_after": after, "parameters_ratio": after / before}
    return counts | {"before": {"perplexity": {}}, "after": {"perplexity": {}}} | _told(args, clock)


def _keep(args: PruneArguments, plan: PruningPlan, scores: Scores | None, folder: Path) -> None:
    """Write the plan, and the scores that it was made by."""
    plan.settings |= {"base_model": args.base_model, "command": shlex.join(sys.argv)}
    if args.shape:
        plan.settings["shape"] = args.shape
    plan.save(folder / PLAN_FILE)
    if scores is not None:
        scores.save(folder / SCORES_FILE)


def _told(args: PruneArguments, clock: Stopwatch) -> dict[str, Any]:
    """What the record of every run says of how it went."""
    return {
        "seconds": clock.seconds,
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "peak_cuda_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if torch.cuda.is_available() else None,
        "arguments": asdict(args),
        **provenance(args.seed),
    }


def calibration_set(args: PruneArguments, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The calibration samples; a short text may give fewer than a preset wants, but not fewer than the user does."""
    samples, tokens = cast(int, args.num_examples), cast(int, args.calib_seq_len)
    fewer = "num_examples" in args.by_preset
    ids = calibration(args.calib_dataset, tokenizer, samples, tokens, args.calib_seed, fewer)
    if len(ids) < samples:
        log.info("the calibration text gives %d samples of %d tokens, not %d", len(ids), tokens, samples)
    return ids


def _compensated(
    args: PruneArguments, model: PreTrainedModel, pruned: PreTrainedModel, plan: PruningPlan, ids: torch.Tensor
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The pruned model, compensated; one that cannot be is left alone unless the user asked for it."""
    try:
        if args.self_examples and not (args.stream and "self_examples" in args.by_preset):
            ids = torch.cat([self_calibration(model, ids, args.self_examples, args.seed), ids])
            log.info("compensating on %d samples, %d of them the model's own", len(ids), args.self_examples)
        if args.compensate == "bias":
            pruned = with_biases(pruned, ids)
        kept = next((kept.tolist() for kept in plan.layers.values()), None)
        report = compensate(model, pruned, ids, str(args.compensate), kept)
    except PrunerError as error:
        if "compensate" not in args.by_preset:
            raise
        log.info("no compensation: %s", error)
        return pruned, {"none": str(error)}
    moved = sum(refit.ridge is not None for refit in report.layers)
    log.info(
        "compensation moved %d of %d projections, logits scaled by %s", moved, len(report.layers), report.temperature
    )
    return pruned, asdict(report)


def too_large(args: PruneArguments) -> bool:
    """Whether original and pruned weights side by side would not fit, so that the model must be streamed."""
    if locate(args.base_model)[1] is not None:  # GGUF: nothing to map, it is dequantized in memory
        return False
    config = load_config(args.base_model, args.trust_remote_code)
    meta = meta_model(config, args.trust_remote_code)
    stored = torch.float32 if args.device == "cpu" else meta.dtype
    asked = DTYPES[args.dtype]
    dtype = asked if isinstance(asked, torch.dtype) else stored
    needed = 2 * dtype.itemsize * parameter_count(meta)
    device = torch.device(args.device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        log.info(
            "streaming: the model and its pruned copy take %.1f GiB, %.1f are free on %s",
            needed / 2**30,
            free / 2**30,
            args.device,
        )
    return needed > free


def _moved(args: PruneArguments, model: PreTrainedModel, device: str) -> None:
    """Move a model to where it is used next, unless its layers stay in their files or on several devices."""
    if not args.stream and not args.device_map:
        cast(Any, model).to(device)


def _latency(args: PruneArguments, model: PreTrainedModel, pruned: PreTrainedModel) -> dict[str, Any]:
    """What a forward pass of both models takes, timed in turn."""
    before, after = (latency(m, args.budget_tokens, args.budget_batch) for m in (model, pruned))
    log.info("a forward pass takes %.1f ms, %.1f before (%.3f)", after / 1e3, before / 1e3, after / before)
    return {"before_us": before, "after_us": after, "tokens": args.budget_tokens, "batch": args.budget_batch}


def _evaluation_windows(
    args: PruneArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, torch.Tensor]:
    """Every evaluation text cut into windows, before any work is done: a missing text is found out at once."""
    if listed(args.eval_datasets):
        check_length(model, args.max_seq_len)
    return {
        name: windows(tokenizer, text(name, "test"), args.max_seq_len, args.max_windows or None)
        for name in listed(args.eval_datasets)
    }


def _test(
    when: str,
    samples: bool,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: PruneArguments,
    evaluation: dict[str, torch.Tensor],
    clock: Stopwatch,
) -> dict[str, Any]:
    """Perplexity on every text, and if asked continuations of LLM-Pruner's kind of prompts."""
    compute = native(model).on(torch.device(args.eval_device))
    _moved(args, model, args.eval_device)
    metrics: dict[str, Any] = {"perplexity": {}}
    if samples:
        with clock("generate"), computing(model, compute):
            metrics["samples"] = [generate(model, tokenizer, prompt, args) for prompt in PROMPTS]
        for sample in metrics["samples"]:
            log.info("%s: %s", when, sample)
    for name, ids in evaluation.items():
        with clock("perplexity"):
            result = perplexity(model, ids, compute=compute)
        metrics["perplexity"][name] = asdict(result)
        log.info("perplexity %s on %s: %.4f (%d tokens)", when, name, result.perplexity, result.tokens)
    return metrics


@torch.no_grad()
def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, args: PruneArguments) -> str:
    """One sampled continuation, up to ``max_seq_len`` tokens in all; seeded, so both models draw alike."""
    set_seed(args.seed)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    out = cast(Any, model).generate(
        **inputs,
        do_sample=True,
        top_k=50,
        top_p=args.top_p,
        temperature=args.temperature,
        max_length=max(args.max_seq_len, inputs["input_ids"].shape[1] + 1),
        pad_token_id=pad_id(tokenizer),
    )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))

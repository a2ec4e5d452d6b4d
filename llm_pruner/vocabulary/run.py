"""Run ``llm-pruner vocab``: count, choose, cut, compare, save."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.card import write_card
from ..checkpoint.load import load_with_tokenizer
from ..checkpoint.locate import PLAN_FILE
from ..checkpoint.next_steps import log_next_steps
from ..checkpoint.unread import UNREAD, unread_tensors
from ..checkpoint.write_pruned import write_pruned
from ..corpora import text
from ..errors import PrunerError
from ..files import complete_folder, folder_for_run, strict_json, write_text
from ..graph.units import CouplingGraph, Unit, trace
from ..logs import log, logging_to
from ..models.dispatch import resolve_device
from ..models.inputs import reads_text_only
from ..models.skeleton import parameter_count
from ..provenance import command_line, provenance
from ..selection.plan import PruningPlan
from ..surgery.apply import apply
from .arguments import DEFAULT_OUTPUT, VocabArguments
from .choosing import scripts_of
from .comparison import Comparison, compare_vocabularies
from .counting import iterate_documents
from .retention import Retention, kept_tokens

LOG_FILE, METRICS_FILE = "vocabulary.log", "vocabulary.json"


def prune_vocabulary(args: VocabArguments) -> Path:
    """Cut the vocabulary of a model; return the folder of the new checkpoint.

    Raises:
        PrunerError: an argument is not valid, or the model's vocabulary cannot be cut.
    """
    args.check()
    settings = resolve(args)
    held_out = text(args.eval_dataset, "test")
    if not held_out.strip():
        raise PrunerError(f"--eval_dataset {args.eval_dataset} has no text to compare both models on")
    for source in settings.corpus:  # so that a missing text is found before the model is loaded
        next(iterate_documents(source, 1), None)
    device = resolve_device(args.device, "--device")
    target = folder_for_run(Path(args.output), METRICS_FILE, asdict(args), named=args.output != DEFAULT_OUTPUT)
    with complete_folder(target, owned_if="config.json", reads=args.model) as folder, logging_to(folder / LOG_FILE):
        if target != Path(args.output):
            log.info("writing to %s: %s holds another run", target, args.output)
        model, tokenizer = load_with_tokenizer(args.model, args.dtype, device, args.trust_remote_code)
        if not reads_text_only(model):
            raise PrunerError(f"vocab compares models on text alone, and {type(model).__name__} needs other inputs")
        kept = kept_tokens(settings, model, tokenizer)
        graph = trace(model)
        unit = _vocabulary_of(model, graph)
        if kept[-1] >= unit.size:
            raise PrunerError(
                f"the model has rows for {unit.size} tokens, and its tokenizer has others, such as id {kept[-1]}: "
                "resize the embeddings, or give the tokenizer that belongs to the model"
            )
        plan = PruningPlan(settings={"base_model": args.model, "command": command_line()})
        if left_out := unread_tensors(model):
            plan.settings[UNREAD] = left_out
        plan.keep(unit, torch.tensor(kept), graph.shapes)
        metrics = _cut(
            plan,
            (model, tokenizer),
            folder,
            name=target.name,
            held_out=held_out,
            args=args,
        )
        metrics |= {"arguments": asdict(args), **provenance()}
        write_text(folder / METRICS_FILE, strict_json(metrics))
    with logging_to(target / LOG_FILE):
        log_next_steps(target, "vocab", original=args.model, trust_remote_code=args.trust_remote_code)
    print(target)
    return target


def resolve(args: VocabArguments) -> Retention:
    """Turn flags into settings.

    Raises:
        PrunerError: a language is unknown.
    """
    return Retention(
        keep=args.keep or "1.0",
        min_count=args.min_count,
        to_tokenizer=args.to_tokenizer,
        scripts=(*args.scripts, *scripts_of(args.languages)),
        unseen_characters=args.characters == "all",
        listed=Path(args.keep_tokens) if args.keep_tokens else None,
        corpus=tuple(args.corpus),
        max_documents=args.max_documents or None,
        counts_file=Path(args.save_counts) if args.save_counts else None,
        trust_remote_code=args.trust_remote_code,
    )


def _vocabulary_of(model: PreTrainedModel, graph: CouplingGraph) -> Unit:
    """Return the only vocabulary unit of a model."""
    units = graph.of_kind("vocabulary")
    if len(units) != 1:
        reason = next((u.frozen for u in graph.frozen if "vocabulary" in u.name), f"it has {len(units)}")
        raise PrunerError(f"the vocabulary of {type(model).__name__} cannot be cut: {reason}")
    return units[0]


def _cut(
    plan: PruningPlan,
    original: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    folder: Path,
    *,
    name: str,
    held_out: str,
    args: VocabArguments,
) -> dict[str, Any]:
    """Write the smaller checkpoint with a card for its ``name``; return its sizes and how it compares."""
    model, tokenizer = original
    pruned = apply(model, plan)
    (choice,) = plan.units.values()
    sizes = {
        "tokens_before": choice.size,
        "tokens_after": choice.kept.numel(),
        "parameters_before": parameter_count(model),
        "parameters_after": parameter_count(pruned),
    }
    log.info("tokens: %d -> %d", sizes["tokens_before"], sizes["tokens_after"])
    log.info("parameters: %d -> %d", sizes["parameters_before"], sizes["parameters_after"])
    write_pruned(
        pruned,
        tokenizer,
        folder,
        plan,
        source=args.model,
        dequantize=args.dequantize,
        trust_remote_code=args.trust_remote_code,
    )
    comparison = compare_vocabularies(
        original,
        (pruned, AutoTokenizer.from_pretrained(folder, trust_remote_code=args.trust_remote_code)),
        choice.kept.tolist(),
        held_out=held_out,
        max_windows=args.max_windows or None,
    )
    _log_comparison(comparison)
    write_card(pruned.config, folder, PruningPlan.load(folder / PLAN_FILE), name)
    return {**sizes, "comparison": asdict(comparison)}


def _log_comparison(comparison: Comparison) -> None:
    values = asdict(comparison)
    before, after = values.pop("byte_perplexity_before"), values.pop("byte_perplexity_after")
    for name, value in values.items():
        if value is not None:
            log.info("%s: %s", name, round(value, 4) if isinstance(value, float) else value)
    if before is not None:
        log.info("perplexity per byte: %.4f -> %.4f", before, after)

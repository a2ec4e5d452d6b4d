"""Measure a model before and after pruning: perplexity, and test generations."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..corpora import text
from ..display import percent
from ..evaluation.generation import PROMPTS
from ..evaluation.latency import latencies
from ..evaluation.perplexity import check_length, perplexity, title_of_text, windows
from ..evaluation.similarity import Originals, pieces_of
from ..logs import log
from ..media import is_media
from ..models.blockwise import computing, native_compute
from ..models.generate import Sampling, continue_text
from ..models.inputs import reads_text_only
from ..models.tasks import predicts_tokens
from ..turns import paired_ratio, relative_spread
from .context import Stopwatch
from .settings import BudgetSettings, EvaluationSettings, PruneSettings

UNUSABLE = 10.0  # times the original's perplexity


def evaluation_windows(
    settings: EvaluationSettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    originals: Originals,
    fallback: str,
) -> dict[str, Any]:
    """Cut every evaluation text into windows, so that a missing text is found before any work is done.

    Args:
        originals: keeps the images or sounds that outputs are compared on.
        fallback: data set of a model that cannot do with texts alone.

    Returns:
        By the name of the text: windows of tokens, a LongTensor ``[windows, tokens]``, for a model that predicts
        tokens; pieces of text, a list, for others that read text; inputs by name for images and sounds.
    """
    if not reads_text_only(model):
        return originals.media(settings.datasets, model, settings.max_windows, fallback)
    assert tokenizer is not None  # of a model that reads text
    if not predicts_tokens(model):
        return {name: pieces_of(text(name, "test"), settings.max_windows) for name in settings.datasets}
    media = [name for name in settings.datasets if is_media(name)]
    texts = [name for name in settings.datasets if name not in media]
    if texts:
        check_length(model, settings.tokens)
    return {
        title_of_text(name, tokenizer, settings.bos): windows(
            tokenizer, text(name, "test"), settings.tokens, settings.max_windows, bos=settings.bos
        )
        for name in texts
    } | originals.media(media, model, settings.max_windows)


def evaluate_model(
    settings: PruneSettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: dict[str, Any],
    *,
    when: str,
    clock: Stopwatch,
    originals: Originals,
) -> dict[str, Any]:
    """Return the perplexity on every text and, where asked for, continuations of LLM-Pruner's kind of prompts.

    Outputs for images or sounds, and all of a model that does not predict tokens, are compared with the original's.

    Args:
        texts: from :func:`evaluation_windows`.
        originals: keeps outputs before pruning for those after it.
    """
    evaluation = settings.evaluation
    compute = native_compute(model).on(torch.device(evaluation.device))
    if not settings.model.offload and not settings.model.device_map:
        model.to(evaluation.device)  # type: ignore[arg-type]
    metrics: dict[str, Any] = {"perplexity": {}}
    compared = {name: inputs for name, inputs in texts.items() if not isinstance(inputs, torch.Tensor)}
    if compared or not predicts_tokens(model):
        with clock("outputs"):
            similarities = originals.compare(model, tokenizer, compared, compute=compute)
        metrics["similarity"] = {name: asdict(result) for name, result in similarities.items()}
        for name, values in metrics["similarity"].items():
            said = [f"{key} {values[key]:.4f}" for key in ("cosine", "agreement") if values[key] is not None]
            log.info("outputs against the original's on %s: %s", name, ", ".join(said))
    if not predicts_tokens(model):
        return metrics
    assert tokenizer is not None
    if evaluation.generate_before if when.startswith("before") else evaluation.generate_after:
        with clock("generate"), computing(model, compute):
            metrics["samples"] = [_sample(settings, model, tokenizer, prompt) for prompt in PROMPTS]
        for sample in metrics["samples"]:
            log.info("%s: %s", when, sample)
    for name, ids in texts.items():
        if name in compared:
            continue
        with clock("perplexity"):
            result = perplexity(model, ids, compute=compute, text_name=name)
        metrics["perplexity"][name] = asdict(result)
        log.info("perplexity %s on %s: %.2f (%d tokens)", when, name, result.perplexity, result.tokens)
    return metrics


def warn_of_lost_quality(metrics: Mapping[str, Any]) -> None:
    """Warn if the perplexity of the pruned model is many times the original's."""
    for name, after in metrics["after"]["perplexity"].items():
        before = metrics["before"]["perplexity"][name]["perplexity"]
        if after["perplexity"] > UNUSABLE * before:
            log.warning(
                "perplexity on %s is %.0f times the original's: the model is hardly usable; remove less, or train it "
                "with llm-pruner recover",
                name,
                after["perplexity"] / before,
            )


def _sample(settings: PruneSettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Sample one continuation of up to ``tokens`` tokens, prompt included; seeded, so both models draw alike."""
    evaluation = settings.evaluation
    new_tokens = max(evaluation.tokens - len(tokenizer(prompt).input_ids), 1)
    sampling = Sampling(temperature=evaluation.temperature, top_p=evaluation.top_p, top_k=50)
    return continue_text(
        model, tokenizer, prompt, new_tokens, sampling=sampling, seed=settings.seed, include_prompt=True
    )


def compare_latency(budget: BudgetSettings, model: PreTrainedModel, pruned: PreTrainedModel) -> dict[str, Any]:
    """Time a forward pass of both models in turns.

    Returns:
        Medians in microseconds, spreads as :func:`~llm_pruner.turns.relative_spread` gives them, and the
        ratio of the times, the median over the rounds.
    """
    rounds = latencies((model, pruned), budget.tokens, budget.batch)
    before, after = map(statistics.median, rounds)
    ratio = paired_ratio(rounds[1], rounds[0])
    log.info(
        "a forward pass takes %.1f ms, %.1f before (%.3f ±%s)",
        after / 1e3,
        before / 1e3,
        ratio.median,
        percent(ratio.spread),
    )
    if ratio.warning:
        log.warning("%s", ratio.warning)
    return {
        "before_us": before,
        "after_us": after,
        "before_spread": relative_spread(rounds[0]),
        "after_spread": relative_spread(rounds[1]),
        "ratio": asdict(ratio),
        "tokens": budget.tokens,
        "batch": budget.batch,
    }

"""Evaluate several models side by side: perplexity, accuracy on tasks, size, compute, memory and speed."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.load import no_tokenizer
from ..errors import PrunerError
from ..files import digest
from ..logs import log
from ..models.inputs import input_embedding, reads_text_only
from ..models.layers import LayerLocator
from ..models.per_layer import layer_lists
from ..models.skeleton import parameter_count
from ..models.tasks import predicts_tokens
from ..models.towers import tower_paths
from ..serving.engines import EngineSpeed
from .cost import macs, memory
from .divergence import Divergence, OriginalDistributions
from .generation import GenerationQuality, continue_prompts
from .labelled import measure_labelled
from .perplexity import Perplexity, perplexity, title_of_text, windows
from .questions import Questions
from .similarity import Originals, Similarity, pieces_of
from .speed import Speed, speed, speeds, tokens_read, warnings_of
from .zero_shot import Prompting, ZeroShot, zero_shot

DEFAULT_TOKENS = 128  # for multiply-accumulates and the cache where no speed is measured


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Settings of an evaluation.

    Attributes:
        texts: texts by name, for perplexity.
        media: folders of images or sounds, for models that read these.
        seq_len, stride, bos, max_windows: how texts are cut into windows; see :func:`~.perplexity.windows`.
        batch_size: windows or requests per forward pass; None: as many as fit.
        tasks: names of lm-eval's tasks, or of :data:`~.task_sets.TASK_SETS`.
        labelled: labelled files or folders; see :func:`~.labelled.measure_labelled`.
        include_path, limit, num_fewshot, prompting: of those tasks; see :func:`~.zero_shot.zero_shot`.
        tokens, batch: size of the input for speed, multiply-accumulates and cache; 0 tokens: measure no speed.
        new_tokens: tokens to generate for decode speed and after each prompt.
        prompts: texts to continue greedily.
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    media: tuple[str, ...] = ()
    seq_len: int = 128
    stride: int | None = None
    bos: bool = True
    max_windows: int | None = None
    batch_size: int | None = None
    tasks: tuple[str, ...] = ()
    labelled: tuple[str, ...] = ()
    include_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    prompting: Prompting = field(default_factory=Prompting)
    tokens: int = DEFAULT_TOKENS
    batch: int = 1
    new_tokens: int = 32
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Measurements of one model.

    Attributes:
        parameters: number of parameters, tied ones counted once.
        parts: parameters of each part: ``embeddings``, ``head`` where it is not tied, and the modules of a layer, such
            as ``self_attn`` and ``mlp``, summed over layers.
        macs: multiply-accumulates of a forward pass over ``[batch, tokens]``.
        weight_bytes, cache_bytes: of the weights, and of the cache that ``[batch, tokens]`` fill.
        perplexity: by the name of the text; empty for a model that does not predict tokens.
        similarity: of such a model to the first one, by the name of the text; empty for the first one itself.
        tasks: metrics by the name of the task.
        tokenizer: hash of its vocabulary; perplexities per token of different tokenizers do not compare.
        samples: continuation by prompt.
        generation: properties of these continuations.
        divergence: of the next-token distributions from the first model's, by the name of the text.
        questions: results of single questions by task.
        results: lm-eval's own record.
        engine: speeds in another engine, if one was asked for.
    """

    model: str
    parameters: int
    parts: dict[str, int]
    macs: int
    weight_bytes: int
    cache_bytes: int
    perplexity: dict[str, Perplexity]
    tasks: dict[str, dict[str, float]]
    speed: Speed | None
    tokenizer: str
    samples: dict[str, str] = field(default_factory=dict)
    similarity: dict[str, Similarity] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict, repr=False)
    engine: EngineSpeed | None = None
    generation: GenerationQuality | None = None
    divergence: dict[str, Divergence] = field(default_factory=dict)
    questions: dict[str, Questions] = field(default_factory=dict, repr=False)

    @property
    def non_embedding(self) -> int:
        return self.parameters - self.parts.get("embeddings", 0)


def have_one_tokenizer(evaluations: Iterable[Evaluation]) -> bool:
    """Return True if models read the same tokens, so that their perplexities per token compare."""
    return len({one.tokenizer for one in evaluations}) == 1


def evaluate_model(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: Measurements,
    *,
    originals: Originals | None = None,
    distributions: OriginalDistributions | None = None,
) -> Evaluation:
    """Measure a model on the device that it is on.

    Args:
        settings: what to measure; the speed is measured last.
        originals: outputs to compare a model with that does not predict tokens; the first such model adds its own.
        distributions: the same for next-token distributions; None measures no divergence.

    Raises:
        PrunerError: a text is too short, a loss is not finite, or a task is not available.
    """
    evaluation = _evaluate_without_speed(
        name, model, tokenizer, settings, originals=originals or Originals(), distributions=distributions
    )
    if not settings.tokens:
        return evaluation
    return replace(evaluation, speed=speed(model, settings.tokens, settings.batch, new_tokens=settings.new_tokens))


def _evaluate_without_speed(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    settings: Measurements,
    *,
    originals: Originals,
    distributions: OriginalDistributions | None,
) -> Evaluation:
    writes = predicts_tokens(model)
    if settings.tasks and not writes:
        raise PrunerError(f"--tasks needs a language model, and {name} is a {type(model).__name__}")
    if tokenizer is None and reads_text_only(model):
        raise no_tokenizer(name)
    if settings.media and reads_text_only(model) and not tower_paths(model):
        raise PrunerError(f"{name} reads text and no images or sounds: name texts instead of {settings.media[0]}")
    for_text = cast(PreTrainedTokenizerBase, tokenizer)
    texts = _windows_of_texts(for_text, settings) if writes else {}
    perplexities = _measure_perplexities(name, model, for_text, texts, settings=settings)  # finds broken weights
    vocabulary = digest(sorted(tokenizer.get_vocab().items())) if tokenizer is not None else ""
    tasks = _run_tasks(model, for_text, settings) if settings.tasks else ZeroShot()
    tokens = tokens_read(model, settings.tokens or DEFAULT_TOKENS)
    weight_bytes = sum(p.nbytes for p in model.parameters())
    samples, quality = _continue_prompts(model, for_text, settings) if writes else ({}, None)
    return Evaluation(
        model=name,
        parameters=parameter_count(model),
        parts=count_parts(model),
        macs=macs(model, tokens, settings.batch),
        weight_bytes=weight_bytes,
        cache_bytes=memory(model, tokens, settings.batch) - weight_bytes,
        perplexity=perplexities,
        tasks=tasks.tasks | _measure_labelled(model, tokenizer, settings),
        speed=None,
        tokenizer=vocabulary,
        samples=samples,
        generation=quality,
        divergence=distributions.compare(model, texts, vocabulary) if distributions is not None else {},
        questions=tasks.questions,
        similarity=_measure_similarities(model, tokenizer, settings, originals) if settings.media or not writes else {},
        results=tasks.results,
    )


def _windows_of_texts(tokenizer: PreTrainedTokenizerBase, settings: Measurements) -> dict[str, torch.Tensor]:
    return {
        title_of_text(name, tokenizer, settings.bos): windows(
            tokenizer, text, settings.seq_len, settings.max_windows, stride=settings.stride, bos=settings.bos
        )
        for name, text in settings.texts.items()
    }


def _measure_perplexities(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, torch.Tensor],
    *,
    settings: Measurements,
) -> dict[str, Perplexity]:
    return {
        title: perplexity(
            model,
            ids,
            settings.batch_size,
            stride=settings.stride,
            tokenizer=tokenizer,
            model_name=name,
            text_name=title,
        )
        for title, ids in texts.items()
    }


def _measure_labelled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, settings: Measurements
) -> dict[str, dict[str, float]]:
    return {name: measure_labelled(model, tokenizer, name, settings.limit) for name in settings.labelled}


def _measure_similarities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, settings: Measurements, originals: Originals
) -> dict[str, Similarity]:
    if settings.media or not reads_text_only(model):
        media = originals.media((*settings.media, *settings.texts), model, settings.max_windows)
        return originals.compare(model, tokenizer, media)
    texts = {title: pieces_of(text, settings.max_windows) for title, text in settings.texts.items()}
    return originals.compare(model, tokenizer, texts)


def keep_outputs(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase | None], settings: Measurements, originals: Originals
) -> None:
    """Keep the outputs of a model, loaded with its tokenizer, on the data sets of an evaluation.

    Raises:
        PrunerError: the model reads text and has no tokenizer, or an output is not finite.
    """
    model, tokenizer = loaded
    if tokenizer is None and reads_text_only(model):
        raise no_tokenizer(str(model.name_or_path))
    _measure_similarities(model, tokenizer, settings, originals)


def _continue_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Measurements
) -> tuple[dict[str, str], GenerationQuality | None]:
    if not settings.prompts:
        return {}, None
    return continue_prompts(model, tokenizer, settings.prompts, settings.new_tokens)


def _run_tasks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Measurements) -> ZeroShot:
    return zero_shot(
        model,
        tokenizer,
        settings.tasks,
        include_path=settings.include_path,
        limit=settings.limit,
        num_fewshot=settings.num_fewshot,
        batch_size=settings.batch_size,
        prompting=settings.prompting,
    )


def evaluate_models(
    names: Iterable[str],
    load: Callable[[str], tuple[PreTrainedModel, PreTrainedTokenizerBase | None]],
    settings: Measurements,
    *,
    together: bool = False,
    originals: Originals | None = None,
) -> list[Evaluation]:
    """Measure models one after the other: each is loaded, measured and dropped before the next.

    Args:
        load: returns model and tokenizer of a name.
        together: keep all models loaded to time them in turns, so that their speeds compare however busy the machine
            is; False times each by itself, and gives no ratios of speeds.
        originals: outputs to compare those of all models with (default: those of the first).

    Raises:
        PrunerError: as :func:`evaluate_model`.
    """
    evaluations, models, names = [], [], list(names)
    originals = originals or Originals()
    distributions = OriginalDistributions() if len(names) > 1 else None
    for name in names:
        model, tokenizer = load(name)
        if together and settings.tokens:
            measured = _evaluate_without_speed(
                name, model, tokenizer, settings, originals=originals, distributions=distributions
            )
            models.append(model)
        else:
            measured = evaluate_model(
                name, model, tokenizer, settings, originals=originals, distributions=distributions
            )
        evaluations.append(measured)
        del model, tokenizer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if models:
        timings = speeds(models, settings.tokens, settings.batch, new_tokens=settings.new_tokens)
        evaluations = [replace(one, speed=timed) for one, timed in zip(evaluations, timings, strict=True)]
    for warning in warnings_of([one.model for one in evaluations], [one.speed for one in evaluations]):
        log.warning("%s", warning)
    return evaluations


def count_parts(model: PreTrainedModel) -> dict[str, int]:
    """Count the parameters of the embeddings, of an untied head, and of the modules that layers consist of."""
    embeddings, head = input_embedding(model), model.get_output_embeddings()
    part_of = {id(p): "embeddings" for p in (embeddings.parameters() if embeddings is not None else ())}
    for parameter in head.parameters() if head is not None else ():
        part_of.setdefault(id(parameter), "head")
    locate = LayerLocator(list(layer_lists(model)))
    counts: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        layer = locate(name)
        module = name.removeprefix(f"{layer[0]}.{layer[1]}.").split(".")[0] if layer else "other"
        counts[part_of.get(id(parameter), module)] += parameter.numel()
    return dict(counts)

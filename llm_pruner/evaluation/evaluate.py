"""Several models side by side: what they are worth and what they cost."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import digest
from ..models.generate import continue_text
from ..models.layers import LayerLocator
from ..models.per_layer import layer_lists
from ..models.running import context_length
from ..models.skeleton import parameter_count
from .cost import macs, memory
from .perplexity import Perplexity, perplexity, tokens_per_byte, windows
from .speed import Speed, speed
from .zero_shot import ZeroShot, zero_shot

# LLM-Pruner's.
PROMPTS = (
    "I believe the meaning of life is",
    "Simply put, the theory of relativity states that",
    "Building a website can be done in 10 simple steps:\n",
)


@dataclass
class Measurements:
    """What to measure.

    Attributes:
        texts: by name; perplexity is measured on each.
        tasks: of lm-eval.
        tokens, batch, new_tokens: at which speed, multiply-accumulates and the cache are meant; 0 tokens: no speed.
        prompts: to be gone on with, the most probable token each time.
    """

    texts: dict[str, str] = field(default_factory=dict)
    seq_len: int = 128
    stride: int | None = None
    max_windows: int | None = None
    batch_size: int | None = None
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    tokens: int = 128
    batch: int = 1
    new_tokens: int = 32
    prompts: tuple[str, ...] = ()


@dataclass
class Evaluation:
    """A model's measurements.

    Attributes:
        parameters: all of them, tied ones once.
        parts: of them in each part: ``embeddings``, and what layers are made of, such as ``self_attn`` and ``mlp``.
        macs: multiply-accumulates of reading ``tokens`` tokens.
        weight_bytes, cache_bytes: of the weights, and of the cache that ``[batch, tokens]`` fill.
        tokenizer: a hash of its vocabulary; perplexities of two tokenizers do not compare.
        samples: what it writes after each prompt.
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
    results: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def non_embedding(self) -> int:
        return self.parameters - self.parts.get("embeddings", 0)


def evaluate_model(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: Measurements
) -> Evaluation:
    """Measure a model where it lies."""
    found = {}
    for title, text in wanted.texts.items():
        ids = windows(tokenizer, text, wanted.seq_len, wanted.max_windows, wanted.stride)
        result = perplexity(model, ids, wanted.batch_size, stride=wanted.stride)
        found[title] = replace(result, tokens_per_byte=tokens_per_byte(tokenizer, ids, wanted.stride))
    tasks = ZeroShot()
    if wanted.tasks:
        tasks = zero_shot(
            model,
            tokenizer,
            wanted.tasks,
            wanted.include_path,
            wanted.limit,
            wanted.num_fewshot,
            wanted.batch_size or "auto",
        )
    tokens = min(wanted.tokens or 128, context_length(model) or 2**31)
    weights = sum(p.nbytes for p in model.parameters())
    return Evaluation(
        name,
        parameter_count(model),
        parts(model),
        macs(model, tokens, wanted.batch),
        weights,
        memory(model, tokens, wanted.batch) - weights,
        found,
        tasks.tasks,
        speed(model, tokens, wanted.batch, wanted.new_tokens) if wanted.tokens else None,
        digest(sorted(tokenizer.get_vocab().items())),
        {prompt: continue_text(model, tokenizer, prompt, wanted.new_tokens) for prompt in wanted.prompts},
        tasks.results,
    )


def evaluate_models(names: Iterable[str], load: Callable[[str], Any], wanted: Measurements) -> list[Evaluation]:
    """Measure models one after the other, each loaded, measured and dropped before the next."""
    out = []
    for name in names:
        model, tokenizer = load(name)
        out.append(evaluate_model(name, model, tokenizer, wanted))
        del model, tokenizer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return out


def parts(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of the embeddings, the head if it has its own, and of what layers are made of."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    known = {id(p): "embeddings" for p in embeddings.parameters()}
    for parameter in head.parameters() if head is not None else ():
        known.setdefault(id(parameter), "head")
    layer_of = LayerLocator(list(layer_lists(model)))
    out: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        found = layer_of(name)
        within = name.removeprefix(f"{found[0]}.{found[1]}.").split(".")[0] if found else "other"
        out[known.get(id(parameter), within)] += parameter.numel()
    return dict(out)

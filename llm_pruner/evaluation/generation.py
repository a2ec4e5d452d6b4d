"""Check what a model writes after fixed prompts: continuations, their length, and how much they repeat themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.generate import generate, pad_id
from ..progress import track

# LLM-Pruner's.
PROMPTS = (
    "I believe the meaning of life is",
    "Simply put, the theory of relativity states that",
    "Building a website can be done in 10 simple steps:\n",
)
# Of other kinds: a fact, a story, instructions, a list and code.
QUALITY_PROMPTS = (
    *PROMPTS,
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "To bake a loaf of bread, you first",
    "The three most important inventions of the last century are",
    "def fibonacci(n):\n",
)
NGRAM = 4


@dataclass(frozen=True, kw_only=True)
class GenerationQuality:
    """Properties of greedy continuations of the fixed prompts.

    Attributes:
        repetition: share of the 4-grams of tokens that are in the same continuation before (seq-rep-4 of Welleck et
            al., arXiv 1908.04319), the mean over prompts.
        tokens: mean number of tokens written.
        ended: share of the continuations that the model ended itself.
        prompts: number of prompts.
        new_tokens: most tokens that could be written.
    """

    repetition: float
    tokens: float
    ended: float
    prompts: int
    new_tokens: int


def continue_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], new_tokens: int
) -> tuple[dict[str, str], GenerationQuality]:
    """Return the greedy continuation of each prompt, and their quality.

    Raises:
        PrunerError: the model cannot generate.
    """
    texts, lengths, repetitions = {}, [], []
    for prompt in track(list(prompts), "continuations"):
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        ids = generate(
            model,
            inputs["input_ids"],  # type: ignore[arg-type]
            new_tokens=new_tokens,
            attention_mask=inputs.get("attention_mask"),
            pad_token=pad_id(tokenizer),
        )[0]
        texts[prompt] = str(tokenizer.decode(ids, skip_special_tokens=True))
        # Of an encoder-decoder, the first token is the one that its decoder begins with, often that of the end.
        written = before_end(ids[1:] if model.config.is_encoder_decoder else ids, model, tokenizer)
        lengths.append(len(written))
        repetitions.append(repetition(written))
    quality = GenerationQuality(
        repetition=sum(repetitions) / len(repetitions),
        tokens=sum(lengths) / len(lengths),
        ended=sum(length < new_tokens for length in lengths) / len(lengths),
        prompts=len(lengths),
        new_tokens=new_tokens,
    )
    return texts, quality


def before_end(ids: torch.Tensor, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens before the first one that ends a text."""
    config = model.generation_config
    ends = config.eos_token_id if config is not None and config.eos_token_id is not None else tokenizer.eos_token_id
    last = {ends} if isinstance(ends, int) else set(ends or ())  # type: ignore[arg-type]
    tokens = ids.tolist()
    return tokens[: next((i for i, token in enumerate(tokens) if token in last), len(tokens))]


def repetition(tokens: Sequence[int]) -> float:
    """Return the share of the 4-grams that occurred before; 0 for a text shorter than one.

    >>> repetition([1, 2, 3, 4, 5, 6, 7, 8]), repetition([1, 2] * 4)
    (0.0, 0.6)
    """
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0

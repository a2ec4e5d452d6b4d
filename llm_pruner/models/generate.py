"""Generate tokens and text: the one place that calls ``model.generate``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..errors import PrunerError, in_one_line
from .running import evaluating


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of sampling; the defaults sample from the model's full distribution.

    Attributes:
        temperature: divides the logits.
        top_p: draw from the most probable tokens that make up this probability.
        top_k: draw from this many most probable tokens; 0: from all.
        repetition_penalty: divides the positive logits of tokens that the text holds already; None: the model's own.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float | None = None


class TokenClock(StoppingCriteria):
    """Count and time the tokens of a running generation, and stop it on demand.

    Attributes:
        tokens: tokens per sequence so far.
        seconds: from the first token to the latest, the time of ``tokens - 1`` decoding steps.
        stopped: set it to stop after the next token.

    Args:
        on_token: called after every token.
    """

    def __init__(self, on_token: Callable[[], None] | None = None) -> None:
        self.tokens, self.seconds, self.stopped = 0, 0.0, False
        self._on_token = on_token
        self._first = 0.0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if input_ids.device.type != "cpu":
            torch.accelerator.synchronize(input_ids.device)
        now = time.perf_counter()
        self._first = self._first or now
        self.tokens, self.seconds = self.tokens + 1, now - self._first
        if self._on_token is not None:
            self._on_token()
        return input_ids.new_full((input_ids.shape[0],), self.stopped, dtype=torch.bool)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id that fills up a batch; without a padding token, the last token's."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id  # type: ignore[return-value]


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that a tokenizer puts before a text, such as beginning-of-sequence; often none.

    Models trained with such a token rely on it: without it at the first place of a window, a Gemma's perplexity is
    many times as high.
    """
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    marked = list(tokenizer("a")["input_ids"])
    starts = (i for i in range(len(marked) - len(plain) + 1) if plain and marked[i : i + len(plain)] == plain)
    return marked[: next(starts, 0)]


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the random numbers of CPU and ``device`` for the block, and restore their state afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    ids: torch.Tensor,
    *,
    new_tokens: int,
    exact: bool = False,
    sampling: Sampling | None = None,
    attention_mask: torch.Tensor | None = None,
    pad_token: int | None = 0,
    clock: TokenClock | None = None,
    streamer: Any = None,
) -> torch.Tensor:
    """Generate tokens after each prompt of a batch.

    Args:
        ids: LongTensor ``[rows, tokens]``, on the device of the embeddings.
        new_tokens: most tokens to generate.
        exact: generate exactly ``new_tokens`` tokens, no end-of-sequence token among them.
        sampling: how to draw tokens; None takes the most probable token each time (greedy).
        attention_mask: ``[rows, tokens]``, 0 for padding; None: no padding.
        pad_token: id that fills rows that ended early.
        clock: counts and times the tokens, and can stop the generation.
        streamer: of transformers, is given every token as it comes.

    Returns:
        LongTensor ``[rows, new tokens]``, without the prompt; of an encoder-decoder all that the decoder generated.

    Raises:
        PrunerError: the model cannot generate, for example since its config lacks ``num_hidden_layers``.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> model = LlamaForCausalLM(config)
    >>> prompts = torch.tensor([[3, 4, 5], [6, 7, 8]])
    >>> generate(model, prompts, new_tokens=4, exact=True).shape
    torch.Size([2, 4])
    >>> with seeded(0, model.device):
    ...     sample = generate(model, prompts, new_tokens=4, exact=True, sampling=Sampling(temperature=0.7))
    >>> sample.shape
    torch.Size([2, 4])
    """
    settings = _generation_config(model, new_tokens=new_tokens, exact=exact, sampling=sampling, pad_token=pad_token)
    options: dict[str, Any] = {"generation_config": settings, "streamer": streamer}
    if clock is not None:
        options["stopping_criteria"] = StoppingCriteriaList([clock])
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    with evaluating(model), _failures_named(model):
        sequences = cast(Any, model).generate(input_ids=ids, attention_mask=mask, **options)
    return sequences if model.config.is_encoder_decoder else sequences[:, ids.shape[1] :]


def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    new_tokens: int,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    include_prompt: bool = False,
) -> str:
    """Generate text after a prompt.

    Args:
        new_tokens: most tokens to generate.
        sampling: how to draw tokens; None takes the most probable token each time (greedy).
        seed: of the draws; the global random state is restored.
        include_prompt: return the prompt as well, decoded together with its continuation.

    Raises:
        PrunerError: the model cannot generate.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    ids = cast(torch.Tensor, inputs["input_ids"])
    with seeded(seed, model.device):
        continuation = generate(
            model,
            ids,
            new_tokens=new_tokens,
            sampling=sampling,
            attention_mask=inputs.get("attention_mask"),
            pad_token=pad_id(tokenizer),
        )
    sequence = torch.cat([ids, continuation], dim=1) if include_prompt else continuation
    return str(tokenizer.decode(sequence[0], skip_special_tokens=True))


def _generation_config(
    model: PreTrainedModel, *, new_tokens: int, exact: bool, sampling: Sampling | None, pad_token: int | None
) -> GenerationConfig:
    """Build the config; what it leaves open, such as the end-of-sequence token, transformers takes from the model's."""
    options: dict[str, Any] = {"do_sample": sampling is not None, "max_new_tokens": new_tokens, "num_beams": 1}
    if exact:
        options["min_new_tokens"] = new_tokens
    if sampling is not None:
        options |= asdict(sampling)
    return GenerationConfig(**options, pad_token_id=pad_token)


@contextmanager
def _failures_named(model: PreTrainedModel) -> Iterator[None]:
    """Turn what transformers raises for a model that cannot generate into one readable error; memory errors pass."""
    try:
        yield
    except (PrunerError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model class of the user's own can fail in any way
        raise PrunerError(f"{type(model).__name__} cannot generate: {in_one_line(error)}") from error

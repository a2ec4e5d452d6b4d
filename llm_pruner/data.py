"""Calibration sets: drawn from texts by name, or written by the model itself."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .choices import SELF
from .corpora import SOME, check_text, conversations, documents, holds_conversations, text
from .errors import PrunerError
from .models.blockwise import computing, native_compute
from .models.generate import Sampling, TokenClock, generate, leading_tokens, seeded
from .models.running import context_length
from .progress import Step

__all__ = ["OPENINGS", "calibration", "continues_text", "documents", "self_calibration", "self_written", "text"]

PROMPTS_PER_PASS = 64
WRITING = "writing calibration text with the model, tokens"
WHOLE_DISTRIBUTION = Sampling(repetition_penalty=1.0)
# Beginnings of texts of many kinds, for text that a model writes itself.
OPENINGS = (
    *("The history of", "In this article", "Once upon a time", "The first step is", "According to the report"),
    *("She looked at", "def ", "Question:", "The most important", "In 1", "There are many", "Dear", "The city of"),
    *("Scientists have", "How to", "I think that", "import ", "What is", "He said", "The game", "For example,"),
    *("The company", "Students will", "A recent study", "On Monday", "The river", "Let", "Our", "When you"),
    *("Although the", "Chapter 1", '"We', "Ingredients:", "Welcome to", "Today,", "The law", "People often", "My"),
    *("Water", "It was"),
)


@dataclass(frozen=True)
class Source:
    """Text of a calibration set: its name, and the share of the samples that come from it."""

    name: str
    share: float = 1.0


def calibration_sources(dataset: str) -> tuple[Source, ...]:
    """Read names of texts with proportions, such as ``c4:0.5,chats.jsonl:0.3,self:0.2``; equal ones where none stand.

    >>> calibration_sources("c4:3,self:1")
    (Source(name='c4', share=0.75), Source(name='self', share=0.25))

    Raises:
        PrunerError: a proportion is not valid, or only some of the texts have one.
    """
    if Path(dataset).expanduser().exists():  # its name may hold commas
        return (Source(dataset),)
    pairs = [_name_and_proportion(entry.strip()) for entry in dataset.split(",") if entry.strip()]
    if not pairs:
        raise PrunerError("--calib_dataset '' names no text: give one, such as general")
    given = [proportion for _, proportion in pairs if proportion is not None]
    if given and len(given) < len(pairs):
        missing = next(name for name, proportion in pairs if proportion is None)
        raise PrunerError(f"--calib_dataset {dataset}: {missing} has no proportion: give all texts one, or none")
    if not all(0 < proportion < math.inf for proportion in given):
        raise PrunerError(f"--calib_dataset {dataset} is not valid: give proportions above 0, such as c4:0.5,self:0.5")
    total = sum(given) or len(pairs)
    return tuple(Source(name, (proportion or 1.0) / total) for name, proportion in pairs)


def check_calibration_text(name: str) -> None:
    """Refuse a text to calibrate on that cannot be read or is empty.

    Raises:
        PrunerError: as :func:`~.corpora.documents`, and :class:`~llm_pruner.errors.Unavailable`.
    """
    if not holds_conversations(name):
        check_text(name)


def _name_and_proportion(entry: str) -> tuple[str, float | None]:
    name, colon, number = entry.rpartition(":")
    if not (name and colon) or Path(entry).expanduser().exists():
        return entry, None
    try:
        return name, float(number)
    except ValueError:
        return entry, None


def calibration(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    samples: int = 10,
    tokens: int = 64,
    *,
    seed: int | None = None,
    fewer: bool = False,
    bos: bool = True,
    packed: bool = False,
    model: PreTrainedModel | None = None,
    self_seed: int = 0,
) -> torch.Tensor:
    """Draw a calibration set: LongTensor ``[samples, tokens]``.

    Documents that occur again are left out. Chats and instructions of a local file are written in the tokenizer's chat
    template. Samples of several texts are mixed evenly, so that any first part holds every text.

    Args:
        name: a text, or several with proportions: ``c4:0.5,chats.jsonl:0.3,self:0.2``.
        seed: None takes the first documents that are long enough, from their beginning; a number draws
            documents, and a place in each, at random (as LLM-Pruner does). Once all documents have been used, samples
            come from their unused parts, from the first document on.
        fewer: accept fewer samples, at least one, if the text is too short.
        bos: begin every sample with the tokens that the tokenizer puts before a text, which count towards ``tokens``;
            False cuts samples from running text, as LLM-Pruner does.
        packed: join documents, each ended by the end-of-text token, and cut samples side by side, so that short
            documents count too; ``seed`` then draws the order of the documents.
        model: writes the samples of the text ``self``, drawn by ``self_seed`` where ``seed`` is None.

    Raises:
        PrunerError: the data set has too little text, a proportion is not valid, or there is no model to write.

    >>> from llm_pruner import load
    >>> calibration("general:3,python-docs:1", load("smollm2-135m")[1], 8, 32).shape
    torch.Size([8, 32])
    """
    sources = calibration_sources(name)
    if samples < 1 or tokens < 2:
        raise PrunerError(f"a calibration set needs at least 1 sample of 2 tokens, not {samples} of {tokens}")
    cutter = _Cutter(tokenizer, tokens, bos)
    rows: list[list[list[int]]] = []
    for source, count in zip(sources, _sample_counts(sources, samples), strict=True):
        if source.name == SELF:
            if model is None:
                raise PrunerError(f"the text {SELF!r} is written by a model, and none is given")
            own = self_written(model, tokenizer, count, tokens, seed=self_seed if seed is None else seed, bos=bos)
            rows.append(own.tolist())
            continue
        rng = None if seed is None else random.Random(seed)
        with Step(f"reading calibration text from {source.name}"):
            texts = _read_texts(source.name, tokenizer, rng)
            drawn = cutter.packed(texts) if packed else cutter.from_documents(texts, rng)
            rows.append(list(itertools.islice(drawn, count)))
        if len(rows[-1]) < count and not (fewer and rows[-1]):
            raise PrunerError(
                f"{source.name} gives {len(rows[-1])} samples of {tokens} tokens (its longest document has "
                f"{cutter.longest}), {count} are needed: ask for fewer or shorter samples, or give more text"
            )
    return torch.tensor(_mix_evenly(rows), dtype=torch.long)


def _sample_counts(sources: Sequence[Source], samples: int) -> list[int]:
    """Share samples out by largest remainders.

    >>> _sample_counts([Source("a", 0.5), Source("b", 0.3), Source("c", 0.2)], 8)
    [4, 2, 2]

    Raises:
        PrunerError: a text would give no sample.
    """
    exact = [source.share * samples for source in sources]
    counts = [int(number) for number in exact]
    by_remainder = sorted(range(len(sources)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: samples - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        name = sources[counts.index(0)].name
        raise PrunerError(f"{name} would give none of {samples} samples: give it a larger proportion, or more samples")
    return counts


def _mix_evenly(groups: list[list[list[int]]]) -> list[list[int]]:
    """Interleave groups of rows so that any first part holds each in proportion.

    >>> _mix_evenly([[[1], [2], [3], [4]], [[8], [9]]])
    [[1], [8], [2], [3], [9], [4]]
    """
    places = [((i + 0.5) / len(group), g, row) for g, group in enumerate(groups) for i, row in enumerate(group)]
    return [row for _, _, row in sorted(places, key=lambda place: place[:2])]


def _read_texts(name: str, tokenizer: PreTrainedTokenizerBase, rng: random.Random | None) -> Iterator[str]:
    """Yield the distinct documents of a text, in an order drawn at random if there is ``rng``."""
    texts: Iterable[str] = (
        conversations(name, tokenizer) if holds_conversations(name) else documents(name, "train", SOME)
    )
    if rng is not None:
        texts = list(texts)
        rng.shuffle(texts)
    seen = set()
    for document in texts:
        if document not in seen:
            seen.add(document)
            yield document


@dataclass
class _Cutter:
    """Cuts texts into samples of ``tokens``.

    Attributes:
        bos: begin each sample with the tokens that the tokenizer puts before a text.
        longest: tokens of the longest document so far.
    """

    tokenizer: PreTrainedTokenizerBase
    tokens: int
    bos: bool
    longest: int = 0

    def __post_init__(self) -> None:
        self._leading = leading_tokens(self.tokenizer)
        self._start = self._leading if self.bos else []
        self._length = self.tokens - len(self._start)
        if self._length < 1:
            raise PrunerError(
                f"samples of {self.tokens} tokens hold no text: the tokenizer puts {len(self._start)} before it"
            )

    def _tokenize(self, document: str) -> list[int]:
        """Return the tokens of a document, without those before it if each sample begins with them."""
        ids = list(self.tokenizer(document, truncation=False, verbose=False)["input_ids"])
        self.longest = max(self.longest, len(ids))
        while self._leading and ids[: len(self._leading)] == self._leading:  # a chat template may write them as well
            ids = ids[len(self._leading) :]
        return ids if self.bos else [*self._leading, *ids]

    def packed(self, documents: Iterable[str]) -> Iterator[list[int]]:
        """Yield samples side by side from all documents joined, each ended by the end-of-text token."""
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        rest: list[int] = []
        for document in documents:
            ids = self._tokenize(document)
            rest += ids if ids[-1:] == end else [*ids, *end]
            full = len(rest) // self._length * self._length
            for i in range(0, full, self._length):
                yield [*self._start, *rest[i : i + self._length]]
            rest = rest[full:]

    def from_documents(self, documents: Iterable[str], rng: random.Random | None) -> Iterator[list[int]]:
        """Yield one sample a document, its beginning or a place drawn by ``rng``, then their unused parts in turn."""
        rests: list[list[int]] = []
        for document in documents:
            rests.append(self._tokenize(document))
            yield from self._take(rests, -1, rng)
        while any(len(rest) >= self._length for rest in rests):
            for i in range(len(rests)):
                yield from self._take(rests, i, rng)

    def _take(self, rests: list[list[int]], i: int, rng: random.Random | None) -> Iterator[list[int]]:
        """Yield a sample from the unused part of a document, if it is long enough, and keep what is left of that."""
        ids = rests[i]
        if len(ids) < self._length:
            return
        start = 0 if rng is None else rng.randint(0, len(ids) - self._length)
        rests[i] = ids[start + self._length :]
        if start >= self._length:
            rests.append(ids[:start])
        yield [*self._start, *ids[start : start + self._length]]


def self_written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    tokens: int,
    *,
    seed: int = 0,
    bos: bool = True,
) -> torch.Tensor:
    """Generate a calibration set with the model itself, without any data: LongTensor ``[samples, tokens]``.

    Every other sample begins with the beginning-of-sequence token alone (Williams et al., arXiv 2410.17170), the rest
    with one of :data:`OPENINGS`, which stays in the sample. All tokens are drawn at temperature 1.

    Args:
        seed: of the draws; the global random state is restored.
        bos: leave the tokens that the tokenizer puts before a text in the samples; see :func:`calibration`.

    Raises:
        PrunerError: the model cannot generate.
    """
    leading = leading_tokens(tokenizer)
    start = leading or [t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None][:1]
    dropped = 0 if leading and bos else len(start)
    prompts = []
    for i in range(samples):
        opening = OPENINGS[i // 2 % len(OPENINGS)] if i % 2 or not start else ""
        prompts.append([*start, *tokenizer(opening, add_special_tokens=False)["input_ids"]][: tokens - 1])
    longest = max(map(len, prompts))
    for length in sorted({*map(len, prompts)} - {longest}):  # to one length, so that all are continued together
        places = [i for i in range(samples) if len(prompts[i]) == length]
        longer = _continue_prompts(model, torch.tensor([prompts[i] for i in places]), longest - length, seed)
        for i, row in zip(places, longer.tolist(), strict=True):
            prompts[i] = prompts[i] + row
    rows, room = torch.tensor(prompts), context_length(model)
    needed = dropped + tokens - longest
    # More tokens are written where there is room: a seed gives several batches the same samples as ever.
    new = tokens if room is None or longest + tokens <= room else needed
    return torch.cat([rows, _continue_prompts(model, rows, new, seed)], dim=1)[:, dropped : dropped + tokens]


def _continue_prompts(model: PreTrainedModel, prompts: torch.Tensor, tokens: int, seed: int) -> torch.Tensor:
    """Let a model write ``tokens`` tokens after each of the prompts, at temperature 1; on the CPU.

    Raises:
        PrunerError: the model cannot generate.
    """
    if not continues_text(model):
        raise PrunerError(f"{type(model).__name__} does not continue a text")
    device, batches = native_compute(model).device, prompts.split(PROMPTS_PER_PASS)
    step = Step(WRITING, tokens * len(batches))
    with seeded(seed, device), computing(model), step:
        sampling, clock = WHOLE_DISTRIBUTION, TokenClock(step.advance)
        written = [
            generate(model, batch.to(device), new_tokens=tokens, exact=True, sampling=sampling, clock=clock).cpu()
            for batch in batches
        ]
    return torch.cat(written)


def continues_text(model: PreTrainedModel) -> bool:
    """Return True if a model can write text after a prompt."""
    return bool(model.can_generate() and not model.config.is_encoder_decoder)


def self_calibration(
    model: PreTrainedModel, ids: torch.Tensor, samples: int, seed: int = 0, *, leading: int = 0
) -> torch.Tensor:
    """Sample calibration text from the model itself: LongTensor ``[samples, tokens]``.

    Self-written samples cover more than a small text does, and need no data (Williams et al., arXiv 2410.17170, who
    start from the first token alone). They are drawn from the whole distribution at temperature 1; the last quarter of
    each row of ``ids`` in turn is the prompt, which is not returned.

    Args:
        ids: LongTensor ``[rows, tokens]``.
        seed: of the draws; the global random state is restored.
        leading: number of tokens that the tokenizer puts before a text and every row of ``ids`` begins with; prompts
            and samples begin with them, too.

    Raises:
        PrunerError: the model cannot generate.
    """
    tokens, room = ids.shape[1], context_length(model) or 2**31
    prompt_tokens = max(1, min(tokens // 4, room - tokens))
    rows = ids.repeat(-(-samples // len(ids)), 1)[:samples]
    prompts = torch.cat([rows[:, :leading], rows[:, max(leading, tokens - prompt_tokens) :]], dim=1)
    # As many tokens as a sample has are written where there is room: the last one is not read.
    new = max(tokens - leading, min(tokens, room + 1 - prompts.shape[1]))
    written = _continue_prompts(model, prompts, new, seed)
    return torch.cat([rows[:, :leading].to(written), written], dim=1)[:, :tokens]

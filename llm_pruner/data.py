"""Texts by name, and calibration sets made of them.

A name is an embedded text (``general``, ``python-docs``), a hub data set (``wikitext2``, ``ptb``, ``c4``,
``bookcorpus``) or a local ``.txt``, ``.json`` or ``.jsonl`` file; for calibration also ``self``, text that the model
writes itself.
"""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .choices import EMBEDDED_TEXTS, GENERAL, PYTHON_DOCS, SELF
from .errors import PrunerError, Unavailable
from .files import read_json
from .models.blockwise import computing, native_compute
from .models.generate import Sampling, TokenClock, generate, leading_tokens, seeded
from .models.running import context_length
from .progress import Step


@dataclass(frozen=True)
class HubText:
    """Location of a data set on the hub; all are plain files, without a loading script."""

    loader: str
    config: str | None
    column: str
    splits: dict[str, str]  # "train" and "test" -> split or data file
    by_file: bool = False
    whole: str | None = None  # the data files of all of "train", where that has many: the first will do for a sample


_PTB = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/{}/0000.parquet"
HUB = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "text", {"train": "train", "test": "test"}),
    "ptb": HubText(
        "parquet", None, "sentence", {"train": _PTB.format("train"), "test": _PTB.format("validation")}, by_file=True
    ),  # LLM-Pruner measures on its validation part
    "c4": HubText(
        "json",
        None,
        "text",
        {
            "train": "hf://datasets/allenai/c4/en/c4-train.00000-of-01024.json.gz",
            "test": "hf://datasets/allenai/c4/en/c4-validation.00000-of-00008.json.gz",
        },
        by_file=True,
        whole="hf://datasets/allenai/c4/en/c4-train.*.json.gz",
    ),
    "bookcorpus": HubText("rojagtap/bookcorpus", None, "text", {"train": "train"}),
}
TEXTS = Path(__file__).with_name("texts")
HELD_OUT = {GENERAL: 2, PYTHON_DOCS: 5}  # every n-th document is for measuring
COLUMNS = ("text", "sentence", "content", "output")
SOME = 20_000  # documents of a hub data set: calibration and evaluation need a few
CHUNK = 2**20  # characters of a text file that are looked at together
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


def documents(name: str, split: str = "train", most: int | None = None) -> Iterator[str]:
    """Yield the texts of a data set in order, as they come.

    Args:
        name: see the module.
        split: ``train`` (for calibration) or ``test`` (held out). A local file has one split.
        most: of a data set on the hub, stop after so many.

    Raises:
        PrunerError: no such data set, split or file, or a file without text.
    """
    if name in EMBEDDED_TEXTS:
        return iter(_embedded(name, split))
    if name == SELF:
        raise PrunerError(f"the text {SELF!r} is written by the model to be pruned: it is for --calib_dataset only")
    if name in HUB:
        return _from_hub(name, split, most)
    path = Path(name).expanduser()
    if not path.is_file():
        raise PrunerError(
            f"no data set {name!r}{_nearest(name)}: choose from {', '.join((*EMBEDDED_TEXTS, *HUB))}, or give a .txt, "
            ".json or .jsonl file"
        )
    if path.suffix not in (".txt", ".json", ".jsonl"):
        raise PrunerError(f"cannot read {name}: give a .txt, .json or .jsonl file")
    return _from_file(path)


def check_text(name: str, split: str = "train") -> None:
    """Refuse a text that cannot be read or is empty, by its first document.

    Raises:
        PrunerError: as :func:`documents`, and :class:`~llm_pruner.errors.Unavailable`.
    """
    if name in HUB:
        _check_hub(name, split)
    elif not any(document.strip() for document in documents(name, split)):
        raise PrunerError(f"{name} holds no text")


@cache
def _check_hub(name: str, split: str) -> None:
    next(documents(name, split, 1))


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name, [*EMBEDDED_TEXTS, *HUB, SELF], n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def text(name: str, split: str = "test") -> str:
    """Return a data set as one text: documents joined by a blank line, as LLM-Pruner does; a .txt file as it stands."""
    path = Path(name).expanduser()
    if path.suffix == ".txt" and path.is_file():
        return _read(path)
    return "\n\n".join(documents(name, split, SOME))


def calibration(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    samples: int = 10,
    tokens: int = 64,
    *,
    seed: int | None = None,
    fewer: bool = False,
    bos: bool = True,
) -> torch.Tensor:
    """Draw a calibration set: LongTensor ``[samples, tokens]``.

    Args:
        seed: None takes the first documents that are long enough, from their beginning; a number draws
            documents, and a place in each, at random (as LLM-Pruner does). Once all documents have been used, samples
            come from their unused parts, from the first document on.
        fewer: accept fewer samples, at least one, if the text is too short.
        bos: begin every sample with the tokens that the tokenizer puts before a text, which count towards ``tokens``;
            False cuts samples from running text, as LLM-Pruner does.

    Raises:
        PrunerError: the data set has too little text.
    """
    if samples < 1 or tokens < 2:
        raise PrunerError(f"a calibration set needs at least 1 sample of 2 tokens, not {samples} of {tokens}")
    rng = random.Random(seed)
    pool: Iterable[str] = documents(name, "train", SOME)
    if seed is not None:
        pool = list(pool)
        rng.shuffle(pool)
    start = leading_tokens(tokenizer) if bos else []
    if tokens <= len(start):
        raise PrunerError(f"samples of {tokens} tokens hold no text: the tokenizer puts {len(start)} before it")
    rows: list[list[int]] = []
    rests: list[list[int]] = []  # unused parts of documents, for when there are no more documents
    longest = 0
    for document in pool:
        ids = list(tokenizer(document, truncation=False, verbose=False)["input_ids"])
        longest = max(longest, len(ids))
        rests.append(ids[len(start) :])
        _take(rests, -1, rows, tokens - len(start), rng if seed is not None else None)
        if len(rows) == samples:
            return _as_rows(start, rows)
    while any(len(rest) >= tokens - len(start) for rest in rests):
        for i in range(len(rests)):
            _take(rests, i, rows, tokens - len(start), rng if seed is not None else None)
            if len(rows) == samples:
                return _as_rows(start, rows)
    if fewer and rows:
        return _as_rows(start, rows)
    raise PrunerError(
        f"{name} gives {len(rows)} samples of {tokens} tokens (its longest document has {longest}), {samples} are "
        "needed: ask for fewer or shorter samples, or give more text"
    )


def _as_rows(start: list[int], rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor([[*start, *row] for row in rows], dtype=torch.long)


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
    rows: dict[int, torch.Tensor] = {}
    alike = [torch.tensor([i for i in range(samples) if len(prompts[i]) == n]) for n in sorted(set(map(len, prompts)))]
    batches = [places for group in alike for places in group.split(PROMPTS_PER_PASS)]
    prompt_batches = [torch.tensor([prompts[i] for i in places]) for places in batches]
    written = _continue_prompts(model, prompt_batches, tokens, seed)
    for places, batch, continued in zip(batches, prompt_batches, written, strict=True):
        rows |= zip(places.tolist(), torch.cat([batch[:, dropped:], continued], dim=1)[:, :tokens], strict=True)
    return torch.stack([rows[i] for i in range(samples)])


def _continue_prompts(
    model: PreTrainedModel, batches: Sequence[torch.Tensor], tokens: int, seed: int
) -> list[torch.Tensor]:
    """Let a model write ``tokens`` tokens after every prompt of every batch, at temperature 1; on the CPU.

    Raises:
        PrunerError: the model cannot generate.
    """
    if not continues_text(model):
        raise PrunerError(f"{type(model).__name__} does not continue a text")
    device = native_compute(model).device
    step = Step(WRITING, tokens * len(batches))
    with seeded(seed, device), computing(model), step:
        sampling, clock = WHOLE_DISTRIBUTION, TokenClock(step.advance)
        return [
            generate(model, batch.to(device), new_tokens=tokens, exact=True, sampling=sampling, clock=clock).cpu()
            for batch in batches
        ]


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
    tokens = ids.shape[1]
    prompt_tokens = max(1, min(tokens // 4, (context_length(model) or 2**31) - tokens))
    rows = ids.repeat(-(-samples // len(ids)), 1)[:samples]
    prompts = torch.cat([rows[:, :leading], rows[:, max(leading, tokens - prompt_tokens) :]], dim=1)
    written = torch.cat(_continue_prompts(model, prompts.split(PROMPTS_PER_PASS), tokens, seed))
    return torch.cat([rows[:, :leading].to(written), written], dim=1)[:, :tokens]


def _take(rests: list[list[int]], i: int, rows: list[list[int]], tokens: int, rng: random.Random | None) -> None:
    """Move a sample from the unused part of a document to the rows: its beginning, or a place drawn at random."""
    ids = rests[i]
    if len(ids) >= tokens:
        start = 0 if rng is None else rng.randint(0, len(ids) - tokens)
        rows.append(ids[start : start + tokens])
        rests[i] = ids[start + tokens :]
        if start >= tokens:
            rests.append(ids[:start])


def _embedded(name: str, split: str) -> list[str]:
    """Return the documents of an embedded text; every second or fifth is held out."""
    every = HELD_OUT[name]
    everything = (TEXTS / f"{name}.txt").read_text(encoding="utf-8").split("\n%%\n")
    return [document for i, document in enumerate(everything) if (i % every == every - 1) == (split == "test")]


def _from_hub(name: str, split: str, most: int | None) -> Iterator[str]:
    from datasets import load_dataset

    where = HUB[name]
    if split not in where.splits:
        raise PrunerError(f"{name} has no held-out part to measure on: choose another text")
    several = where.whole if split == "train" and (most is None or most > SOME) else None
    files = several or where.splits[split]
    try:
        if where.by_file:
            data = load_dataset(where.loader, data_files=files, split="train", streaming=True)
        else:
            data = load_dataset(where.loader, where.config, split=where.splits[split], streaming=True)
        for i, row in enumerate(data):
            if i == most:
                return
            yield row[where.column]
    except Exception as error:  # the hub client raises many kinds; the user needs one line
        reason = " ".join(str(error).split())[:160]
        raise Unavailable(
            f"the data set {name} could not be fetched from the hub ({type(error).__name__}: {reason}); give a local "
            f".txt, .json or .jsonl file instead, or {GENERAL}, which needs no network"
        ) from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PrunerError(f"cannot read {path}: {error}") from error


def _from_file(path: Path) -> Iterator[str]:
    has_rows = False
    for row in read_rows(path):
        has_rows = True
        yield row if path.suffix == ".txt" else _row_text(path, row)
    if not has_rows:
        raise PrunerError(f"{path} holds no rows")


def read_rows(path: Path) -> Iterator[Any]:
    """Yield the entries of a file as they are read: paragraphs of a text, lines of JSON, entries of a list."""
    if path.suffix == ".json":
        content = read_json(path)
        yield from content if isinstance(content, list) else []
        return
    try:
        with path.open(encoding="utf-8", newline="\n" if path.suffix == ".jsonl" else None) as file:
            if path.suffix == ".jsonl":
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _json(line, path, number)
                return
            rest = ""
            while chunk := file.read(CHUNK):
                *whole, rest = (rest + chunk).split("\n\n")
                yield from (part for part in whole if part.strip())
            if rest.strip():
                yield rest
    except (OSError, UnicodeDecodeError) as error:
        raise PrunerError(f"cannot read {path}: {error}") from error


def _json(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PrunerError(f"{path} is not valid jsonl: line {number}: {str(error)[:200]}") from error


def _row_text(path: Path, row: object) -> str:
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        for column in COLUMNS:
            if isinstance(row.get(column), str):
                return row[column]
        raise PrunerError(f"{path} has no column {' or '.join(COLUMNS)}; it has {', '.join(map(str, row))}")
    raise PrunerError(f"{path} must hold texts or rows with a text column")

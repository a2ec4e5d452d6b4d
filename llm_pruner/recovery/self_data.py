"""Self-data distillation: a pruned model learns the original's words instead of the data set's.

The original answers the prompts of the training data anew, and continues the beginnings of plain texts (Thangarasa et
al., arXiv 2410.09982). Words are drawn from its whole distribution at temperature 1, so that the expected loss of
the labels is, up to a constant, the divergence of the pruned model from the original.

Answers that do not end within ``--cutoff_len`` tokens, short texts, and texts that repeat themselves are left out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint.load import load_with_tokenizer
from ..checkpoint.locate import identity
from ..data import WHOLE_DISTRIBUTION, continues_text
from ..errors import PrunerError
from ..evaluation.generation import before_end, repetition
from ..files import digest, write_text
from ..logs import log
from ..models.generate import generate, pad_id, seeded
from ..models.running import context_length
from ..progress import track
from ..provenance import versions
from ..row_kinds import (
    ANSWERS,
    QUESTIONS,
    TEXTS,
    Record,
    RowKind,
    apply_template,
    read_messages,
    read_text,
    row_kind,
)
from .prompts import prompt_template
from .rows import read_rows
from .settings import SelfDataSettings
from .tokenize import ExampleFormat, question_and_answer

FOLDER = Path("datasets/self_data")
PROMPTS_PER_PASS = 32
SHORTEST_TEXT = 8  # tokens of a continuation
MOST_REPETITION = 0.5  # share of 4-grams that were in the text before
BEGINNING = 4  # a plain text is continued from its first tokens, --cutoff_len divided by so many


@dataclass(frozen=True, kw_only=True)
class _Prompt:
    """A prompt of a row.

    Attributes:
        ids: tokens that the original reads.
        fill: makes a training row of the tokens that it writes.
        ends: True for an answer, which must end; False for a text that may go on.
    """

    ids: list[int]
    fill: Callable[[list[int]], Record]
    ends: bool


def rewritten_sources(
    sources: Sequence[str], settings: SelfDataSettings, name: str, form: ExampleFormat, *, seed: int, trust: bool
) -> tuple[str, ...]:
    """Return files with the rows of data sets as the original writes them.

    Files that are there already are read again: their names depend on the rows, the original and the settings.

    Args:
        name: the original's.
        seed: of the draws.

    Raises:
        PrunerError: a source cannot be read, the original cannot continue a text, or no row remains.
    """
    rows = {source: _read(source, settings.rows) for source in sources}
    writes = [versions(), identity(name), str(settings.dtype), form.cutoff_len, _template_text(form), seed]
    files = {source: FOLDER / f"{digest([*writes, records])}.jsonl" for source, records in rows.items()}
    if missing := [source for source, file in files.items() if not file.is_file()]:
        model, tokenizer = load_with_tokenizer(name, settings.dtype, settings.device, trust)
        if not continues_text(model):
            raise PrunerError(f"--self_data needs a decoder that generates, and {name} is {type(model).__name__}")
        for source in missing:
            written = _rewrite(source, rows[source], model, tokenizer, form=form, seed=seed)
            write_text(files[source], "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in written))
    for source, file in files.items():
        log.info("rows of %s as %s writes them: %s", source, name, file)
    return tuple(str(file) for file in files.values())


def _read(source: str, count: int | None) -> list[Record]:
    rows = read_rows(source)
    return list(rows.select(range(min(count or len(rows), len(rows)))))


def _template_text(form: ExampleFormat) -> list[str]:
    """Return what the template makes of two marks, since a template of a file may change."""
    template = prompt_template(form.template)
    return [template("I", "C"), template("I", "")]


def _rewrite(
    source: str,
    rows: list[Record],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    form: ExampleFormat,
    seed: int,
) -> list[Record]:
    """Return the rows that the original writes well, in the order of the data set."""
    kind = row_kind(rows[0], source)
    if kind == "chat" and tokenizer.chat_template is None:
        raise PrunerError(f"{source} holds chats and the original's tokenizer has no chat template: give another set")
    prompts = []
    for number, row in enumerate(rows, 1):
        try:
            prompts.append(_prompt(row, kind, tokenizer, form))
        except PrunerError as error:
            raise PrunerError(f"{source}, row {number}: {error}") from error
    length = min(form.cutoff_len, context_length(model) or form.cutoff_len)
    fitting = [p for p in prompts if p is not None and p.ids and len(p.ids) + SHORTEST_TEXT <= length]
    faults = Counter({"no prompt that fits": len(rows) - len(fitting)})
    written = []
    for prompt, tokens in zip(fitting, _continue(model, tokenizer, fitting, length, seed=seed), strict=True):
        words = before_end(torch.tensor(tokens), model, tokenizer)
        fault = _fault(prompt, words, ended=len(words) < len(tokens), tokenizer=tokenizer)
        faults[fault] += bool(fault)
        if not fault:
            written.append(prompt.fill(words))
    reasons = ", ".join(f"{count} {fault}" for fault, count in faults.items() if count) or "none left out"
    log.info("%s: the original wrote %d of %d rows (%s)", source, len(written), len(rows), reasons)
    if not written:
        raise PrunerError(f"--self_data leaves no row of {source} ({reasons}): raise --cutoff_len, now {length}")
    return written


def _prompt(row: Record, kind: RowKind, tokenizer: PreTrainedTokenizerBase, form: ExampleFormat) -> _Prompt | None:
    """Return the prompt of a row; None for a row without one.

    Raises:
        PrunerError: the row is malformed.
    """

    def encode(text: str, **options: bool) -> list[int]:
        ids = list(tokenizer(text, verbose=False, **options)["input_ids"])
        # A tokenizer may end every text; what the original is to continue has no end.
        return ids[:-1] if not options and ids[-1:] == [tokenizer.eos_token_id] else ids

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    if kind == "text":
        ids = encode(read_text(row, *TEXTS))[: form.cutoff_len // BEGINNING]
        return _Prompt(ids=ids, fill=lambda words: {"text": decode(ids + words)}, ends=False)
    if kind == "chat":
        turns = read_messages(row)
        before = turns[: next((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))]
        if not before:
            return None
        opened = str(apply_template(tokenizer, before, tokenize=False, add_generation_prompt=True))
        return _Prompt(
            ids=encode(opened, add_special_tokens=False),
            fill=lambda words: {"messages": [*before, {"role": "assistant", "content": decode(words).strip()}]},
            ends=True,
        )
    template = prompt_template(form.template)
    question, answer = question_and_answer(row, kind, template, form)
    # Blanks behind a prompt are learnt with the answer: the original writes its own, which training adds again.
    has_blanks = len(answer) > len(read_text(row, *ANSWERS))
    asked = {name: value for name, value in row.items() if name in ("instruction", "input", *QUESTIONS)}
    return _Prompt(
        ids=encode(question),
        fill=lambda words: asked | {"output": decode(words).strip() if has_blanks else decode(words).rstrip()},
        ends=True,
    )


def _fault(prompt: _Prompt, words: list[int], *, ended: bool, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what is wrong with the words that the original wrote after a prompt; "" if nothing is."""
    if prompt.ends and not ended:
        return "unended"
    if not str(tokenizer.decode(words, skip_special_tokens=True)).strip():
        return "empty"
    if not prompt.ends and len(words) < SHORTEST_TEXT:
        return "short"
    return "repetitive" if repetition(words) > MOST_REPETITION else ""


def _continue(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[_Prompt], length: int, *, seed: int
) -> list[list[int]]:
    """Let a model write after prompts, up to ``length`` tokens with the longest prompt of a batch.

    Prompts of similar length share a batch.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    batches = [order[i : i + PROMPTS_PER_PASS] for i in range(0, len(order), PROMPTS_PER_PASS)]
    fill = pad_id(tokenizer) or 0
    written: dict[int, list[int]] = {}
    with seeded(seed, model.device):
        for batch in track(batches, "writing with the original, batches"):
            longest = len(prompts[batch[-1]].ids)
            padding = [longest - len(prompts[i].ids) for i in batch]
            ids = torch.tensor([[fill] * n + prompts[i].ids for i, n in zip(batch, padding, strict=True)])
            mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
            rows = generate(
                model,
                ids.to(model.device),
                new_tokens=length - longest,
                sampling=WHOLE_DISTRIBUTION,
                attention_mask=mask.to(model.device),
                pad_token=fill,
            )
            written |= zip(batch, rows.tolist(), strict=True)
    return [written[i] for i in range(len(prompts))]

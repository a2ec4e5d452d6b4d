"""Examples for training: rows of a data set as token ids and labels.

Labels of prompts are ignored, so that only answers are learnt; of plain text all is learnt. Text is packed into windows
without padding, and with ``packing`` so are chats, instructions and pairs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from ..errors import PrunerError
from ..files import digest
from ..logs import log
from ..models.generate import leading_tokens
from ..models.loss import IGNORED
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
from .objectives import Example, Vocabulary, denoise
from .prompts import Prompt, prompt_template
from .rows import reading, row_columns


@dataclass(frozen=True, kw_only=True)
class ExampleFormat:
    """Format of training examples.

    Attributes:
        cutoff_len: tokens of an example at most, and of a packed window exactly.
        template: prompt template, see :mod:`llm_pruner.recovery.prompts`; None for no template.
        train_on_inputs: learn the prompts too.
        add_eos_token: count the end-of-text token of a prompt tokenized on its own, as LLM-Pruner's flag does.
        encoder_decoder: prompts go to the encoder, answers to the decoder.
        objective: how an encoder-decoder learns from text, see :mod:`llm_pruner.recovery.objectives`; with ``causal``
            the encoder reads the first half of a window and the decoder writes the second.
        seed: of the denoisers.
        packing: join answered prompts into windows of ``cutoff_len`` tokens instead of one example each.
        bos: begin every window with the tokens that the tokenizer puts before a text, which count towards its length.
    """

    cutoff_len: int = 256
    template: str | None = "alpaca"
    train_on_inputs: bool = False
    add_eos_token: bool = False
    encoder_decoder: bool = False
    objective: str = "causal"
    seed: int = 0
    packing: bool = False
    bos: bool = True

    @property
    def max_tokens(self) -> int | None:
        """Tokens of an answered prompt at most; packing cuts none, since a prompt continues in the next window."""
        return None if self.packing else self.cutoff_len


def tokenize(data: Any, tokenizer: PreTrainedTokenizerBase, form: ExampleFormat, source: str) -> Any:
    """Return a data set of ``input_ids`` and ``labels``, lists of at most ``cutoff_len`` token ids.

    Rows without an answer, or whose prompt alone fills ``cutoff_len``, are left out.

    Args:
        source: name of the data set, for messages.

    Raises:
        PrunerError: the columns are unknown, a row is malformed (the message has its number), or no example remains.
    """
    import datasets

    streaming = isinstance(data, datasets.IterableDataset)
    columns = row_columns(data, source)
    kind = row_kind(columns, source)
    make_example = _example_maker(kind, tokenizer, form, source)  # refuses now what a stream would refuse in training
    if kind == "text" or form.packing:
        inputs = {"data": data, "kind": kind, "tokenizer": tokenizer, "form": form, "source": source}
        if streaming:
            return datasets.IterableDataset.from_generator(_windows, gen_kwargs=inputs)
        windows = list(_windows(**inputs | {"data": track(data, f"tokenizing {source}")}))
        if not windows:
            raise PrunerError(f"{source} does not fill one window of {form.cutoff_len} tokens: lower --cutoff_len")
        return datasets.Dataset.from_list(windows)
    options: dict[str, bool] = {} if streaming else {"keep_in_memory": True, "load_from_cache_file": False}
    examples = data.map(make_example, with_indices=True, remove_columns=list(columns), **options)
    examples = examples.filter(_has_labels, **options)
    if not streaming:
        _report_left_out(len(data) - len(examples), len(data), form, source)
    return examples


def _report_left_out(count: int, rows: int, form: ExampleFormat, source: str) -> None:
    if count == rows:
        raise PrunerError(f"no row of {source} has an answer within {form.cutoff_len} tokens: raise --cutoff_len")
    if count:
        log.info("%s: %d of %d rows have no answer within %d tokens", source, count, rows, form.cutoff_len)


def _has_labels(example: Example) -> bool:
    return any(label != IGNORED for label in example["labels"])


def _windows(
    data: Iterable[Record], *, kind: RowKind, tokenizer: PreTrainedTokenizerBase, form: ExampleFormat, source: str
) -> Iterator[Example]:
    """Join examples, each ended by the end-of-text token, and cut them into windows of equal length."""
    make_example = _example_maker(kind, tokenizer, form, source)
    start = leading_tokens(tokenizer) if form.bos else []
    if form.cutoff_len <= len(start):
        raise PrunerError(f"--cutoff_len {form.cutoff_len} is out of range: give more than {len(start)}")
    examples = (make_example(row, index) for index, row in enumerate(_iterate(data, source)))
    windows = _cut(examples, form.cutoff_len, start)
    if form.objective != "causal":
        ids = (window["input_ids"] for window in windows)
        yield from denoise(ids, form.objective, Vocabulary.of(tokenizer), form.seed)
        return
    half = form.cutoff_len // 2
    for window in windows:
        if form.encoder_decoder:
            yield {"input_ids": window["input_ids"][:half], "labels": window["input_ids"][half:]}
        elif _has_labels(window):
            yield window


def _iterate(data: Iterable[Record], source: str) -> Iterator[Record]:
    with reading(source):
        yield from data


def _cut(examples: Iterable[Example], length: int, start: list[int]) -> Iterator[Example]:
    """Yield windows of ``length`` tokens, each begun by the tokens ``start``."""
    opening = {"input_ids": start, "labels": [IGNORED] * len(start)}
    rest: Example = {"input_ids": [], "labels": []}
    for example in examples:
        if not _has_labels(example):
            continue
        for name, ids in rest.items():
            ids += example[name]
        taken = 0
        while True:
            begun = rest["input_ids"][taken : taken + len(start)] == start  # where an example begins
            end = taken + length - (0 if begun else len(start))
            if end > len(rest["labels"]):
                break
            yield {name: ([] if begun else opening[name]) + ids[taken:end] for name, ids in rest.items()}
            taken = end
        rest = {name: ids[taken:] for name, ids in rest.items()}


def _example_maker(
    kind: RowKind, tokenizer: PreTrainedTokenizerBase, form: ExampleFormat, source: str
) -> Callable[[Record, int], Example]:
    """Return the function from a row and its index to an example; its errors name the source and the row."""
    _check_format(kind, tokenizer, form)
    template = prompt_template(form.template)

    def make_example(row: Record, index: int) -> Example:
        try:
            if kind == "text":
                return _document(read_text(row, *TEXTS), tokenizer)
            if kind == "chat":
                return _chat(read_messages(row), tokenizer, form)
            return _answered(*question_and_answer(row, kind, template, form), tokenizer, form)
        except PrunerError as error:
            raise PrunerError(f"{source}, row {index + 1}: {error}") from error

    return make_example


def _check_format(kind: RowKind, tokenizer: PreTrainedTokenizerBase, form: ExampleFormat) -> None:
    """Refuse a format that this kind of rows cannot be given."""
    if kind == "text":
        return
    if form.objective != "causal":
        raise PrunerError(f"--objective {form.objective} denoises plain text, and the data are not: give causal")
    if form.encoder_decoder and form.train_on_inputs:
        raise PrunerError("--train_on_inputs is for decoders: the encoder of an encoder-decoder reads the prompts")
    if form.encoder_decoder and form.packing:
        raise PrunerError("--packing is for decoders: an encoder-decoder reads prompts and writes answers apart")
    if kind == "chat" and tokenizer.chat_template is None:
        raise PrunerError("the data set holds chats and the tokenizer has no chat template: give another data set")
    if kind == "chat" and form.encoder_decoder:
        raise PrunerError("chats are for decoder models: give an encoder-decoder instructions or text")


def question_and_answer(row: Record, kind: RowKind, template: Prompt, form: ExampleFormat) -> tuple[str, str]:
    """Return the prompt and the answer of an instruction or a pair, whose texts are joined.

    Raises:
        PrunerError: the row is malformed.
    """
    answer = read_text(row, *ANSWERS)
    if kind == "instruction":
        question = template(read_text(row, "instruction"), read_text(row, "input"))
    else:
        question = read_text(row, *QUESTIONS)
    # Tokenizers join a blank to the word behind it: one that ends a prompt is learnt with the answer.
    prompt = question.rstrip(" ")
    blank = " " if kind == "instruction" and form.template is None else ""
    return prompt, question[len(prompt) :] + blank + answer


def _document(text: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Learn all of a text and its end; nothing of a blank one."""
    if not text.strip():
        return {"input_ids": [], "labels": []}
    ids = list(tokenizer(text, truncation=False, verbose=False)["input_ids"])
    if tokenizer.eos_token_id is not None and ids and ids[-1] != tokenizer.eos_token_id:
        ids.append(cast(int, tokenizer.eos_token_id))
    return {"input_ids": ids, "labels": list(ids)}


def _answered(question: str, answer: str, tokenizer: PreTrainedTokenizerBase, form: ExampleFormat) -> Example:
    """Learn an answer and its end behind a prompt (LLM-Pruner's ``post_training.py``)."""

    def encode(text: str, end: bool) -> list[int]:
        limit = form.max_tokens
        cut = {"truncation": True, "max_length": limit} if limit else {"truncation": False}
        ids = list(tokenizer(text, verbose=False, **cut)["input_ids"])  # type: ignore[arg-type]
        eos = tokenizer.eos_token_id
        if end and eos is not None and not (limit and len(ids) >= limit) and ids[-1:] != [eos]:
            ids.append(cast(int, eos))
        return ids

    if not answer.strip():
        return {"input_ids": [], "labels": []}
    if form.encoder_decoder:
        return {"input_ids": encode(question, True), "labels": encode(answer, True)}
    ids = encode(question + answer, True)
    if form.train_on_inputs:
        return {"input_ids": ids, "labels": list(ids)}
    asked, eos = encode(question, form.add_eos_token), tokenizer.eos_token_id
    # A tokenizer may end every text by itself, but the prompt has no end before its answer.
    ended = asked[-1:] == [eos] != ids[len(asked) - 1 : len(asked)]
    prompt_len = len(asked) - int(ended or (form.add_eos_token and eos is not None))
    return {"input_ids": ids, "labels": [IGNORED] * min(prompt_len, len(ids)) + ids[prompt_len:]}


def _chat(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, form: ExampleFormat) -> Example:
    """Learn the assistant's turns of a conversation, written by the tokenizer's chat template."""
    input_ids: list[int] = []
    labels: list[int] = []
    for text, learnt in _chat_pieces(messages, tokenizer):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        input_ids += ids
        labels += ids if learnt or form.train_on_inputs else [IGNORED] * len(ids)
    return {"input_ids": input_ids[: form.max_tokens], "labels": labels[: form.max_tokens]}


def _chat_pieces(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Split a conversation into texts and whether each is learnt, that is, written by the assistant."""
    pieces: list[tuple[str, bool]] = []
    before = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i == 0:  # an answer to nothing teaches nothing
            continue
        try:
            opened = str(apply_template(tokenizer, messages[:i], tokenize=False, add_generation_prompt=True))
            closed = str(apply_template(tokenizer, messages[: i + 1], tokenize=False))
        except PrunerError:  # some templates refuse roles, or turns out of order
            continue
        if not (opened.startswith(before) and closed.startswith(opened)):
            # Some templates write earlier turns differently once later ones follow: only the last is certain.
            pieces, before = [], ""
            if not closed.startswith(opened):
                continue
        pieces += [(opened[len(before) :], False), (closed[len(opened) :], True)]
        before = closed
    return pieces


def fingerprint(source: str, tokenizer: PreTrainedTokenizerBase, form: ExampleFormat) -> str:
    """Return a digest of everything that tokenized data depends on: the key of ``--cache_dataset``."""
    path = Path(source).expanduser()
    stamp = [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else []
    template = Path(form.template or "").expanduser()
    content = template.read_text(encoding="utf-8") if template.suffix == ".json" and template.is_file() else ""
    return digest([versions(), source, stamp, content, asdict(form), _rules_of(tokenizer)])


def _rules_of(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Return what decides how a tokenizer splits and ends a text: two of one vocabulary may differ in the rest."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}  # type: ignore[attr-defined]
    lasting = {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")}  # of the last call
    marked = tokenizer("a", verbose=False)["input_ids"]
    return [sorted(tokenizer.get_vocab().items()), lasting, marked, tokenizer.eos_token_id, tokenizer.chat_template]

"""Texts by name.

A name is an embedded text (``general``, ``python-docs``), a hub data set (``wikitext2``, ``ptb``, ``c4``,
``bookcorpus``) or a local ``.txt``, ``.json`` or ``.jsonl`` file.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .choices import EMBEDDED_TEXTS, GENERAL, PYTHON_DOCS, SELF
from .errors import PrunerError, Unavailable, in_one_line
from .files import read_json
from .row_kinds import apply_template, find_row_kind, read_conversation


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
NAMED = (*EMBEDDED_TEXTS, *HUB, SELF)  # names of texts, whatever lies in the working folder
TEXTS = Path(__file__).with_name("texts")
HELD_OUT = {GENERAL: 2, PYTHON_DOCS: 5}  # every n-th document is for measuring
COLUMNS = ("text", "sentence", "content", "output")
SOME = 20_000  # documents of a hub data set: calibration and evaluation need a few
CHUNK = 2**20  # characters of a text file that are looked at together


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
    near = difflib.get_close_matches(name, NAMED, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def text(name: str, split: str = "test") -> str:
    """Return a data set as one text: documents joined by a blank line, as LLM-Pruner does; a .txt file as it stands."""
    path = Path(name).expanduser()
    if path.suffix == ".txt" and path.is_file():
        return _read(path)
    return "\n\n".join(documents(name, split, SOME))


def holds_conversations(name: str) -> bool:
    """Return True if a name is that of a local file whose rows are chats, or instructions or questions with answers."""
    path = Path(name).expanduser()
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        return False
    first = next(read_rows(path), None)
    return isinstance(first, dict) and find_row_kind(first) in ("chat", "instruction", "pair")


def conversations(name: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield the rows of a file of conversations as the tokenizer's chat template writes them.

    Without a template, turns are joined by a blank line. Rows without an answer are left out.

    Raises:
        PrunerError: a row is malformed, or the template refuses it; the message has its number.
    """
    for number, row in enumerate(read_rows(Path(name).expanduser()), 1):
        try:
            messages = read_conversation(row)
            if tokenizer.chat_template is None:
                text = "\n\n".join(message["content"] for message in messages)
            else:
                text = str(apply_template(tokenizer, messages, tokenize=False)) if messages else ""
        except PrunerError as error:
            raise PrunerError(f"{name}, row {number}: {error}") from error
        if text:
            yield text


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
        raise Unavailable(
            f"the data set {name} could not be fetched from the hub ({in_one_line(error, 160)}); give a local "
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
        if no_text := next((column for column in COLUMNS if column in row), None):
            raise PrunerError(f"{path}: {no_text} of a row is {str(row[no_text])[:40]!r}, not a text: leave it out")
        raise PrunerError(f"{path} has no column {' or '.join(COLUMNS)}; it has {', '.join(map(str, row))}")
    raise PrunerError(f"{path} must hold texts or rows with a text column")

"""Training rows: read them from a data set, recognise their kind by their columns, and check their values.

Four kinds of rows are recognised: chats (``messages`` or ``conversations``), instructions (``instruction``, perhaps
``input``, and ``output`` or ``response``), pairs (``prompt`` and ``completion`` or ``response``) and plain text.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, Literal

from ..choices import EMBEDDED_TEXTS
from ..data import HUB, documents
from ..errors import PrunerError, Unavailable
from ..logs import log

Record = dict[str, Any]
RowKind = Literal["chat", "instruction", "pair", "text"]

MAX_DOCUMENTS = 200_000  # documents of a hub text that are read without --streaming
TEXTS = ("text", "content", "sentence")
ANSWERS = ("output", "response", "completion", "answer", "chosen")
QUESTIONS = ("prompt", "question")
CHATS = ("messages", "conversations")
LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
TURN = '{"role": "user", "content": "Hello"}'


def read_rows(source: str, streaming: bool = False) -> Any:
    """Read a data set's training rows as a ``datasets.Dataset`` (an ``IterableDataset`` when streaming).

    Args:
        source: a text by name (``general``, ``python-docs``, ``wikitext2``, ``ptb``, ``c4``, ``bookcorpus``), a local
            ``.json``, ``.jsonl``, ``.parquet``, ``.csv`` or ``.txt`` file, or a data set on the hub.

    Raises:
        PrunerError: the data set cannot be read, or is empty.
    """
    import datasets

    path = Path(source).expanduser()
    if source in HUB or source in EMBEDDED_TEXTS or (path.suffix == ".txt" and path.is_file()):
        if streaming:
            return datasets.IterableDataset.from_generator(_iterate_texts, gen_kwargs={"source": source})
        texts = list(documents(source, "train", MAX_DOCUMENTS))
        if source in HUB and len(texts) == MAX_DOCUMENTS:
            log.info("%s: the first %d documents; --streaming reads all", source, MAX_DOCUMENTS)
        return datasets.Dataset.from_dict({"text": texts})
    with reading(source), _quiet_loader():
        data = _load(source, path, streaming)
    if not streaming and not len(data):
        raise PrunerError(f"the data set {source} is empty")
    return data


def _load(source: str, path: Path, streaming: bool) -> Any:
    import datasets

    if path.is_file():
        if path.suffix not in LOADERS:
            raise PrunerError(f"cannot read {source}: give a {', '.join(LOADERS)} or .txt file")
        if LOADERS[path.suffix] == "json":
            _check_first_row(path)
        return datasets.load_dataset(LOADERS[path.suffix], data_files=str(path), split="train", streaming=streaming)
    is_file_name = path.suffix in (*LOADERS, ".txt") or source.count("/") > 1 or source.startswith((".", "/", "~"))
    if path.exists() or is_file_name:
        raise PrunerError(f"there is no data file {source}")
    return datasets.load_dataset(source, split="train", streaming=streaming)


def check_rows(source: str, streaming: bool = False) -> None:
    """Refuse a data set that cannot be read or whose rows are of no known kind, by its columns or its first row.

    Raises:
        PrunerError: as :func:`read_rows` and :func:`row_kind`.
    """
    import datasets

    path = Path(source).expanduser()
    if streaming or source in HUB or source in EMBEDDED_TEXTS or path.suffix or path.exists():
        row_kind(row_columns(read_rows(source, streaming=True), source), source)
        return
    with reading(source), _quiet_loader():  # finds a cached data set without network, which a stream does not
        features = datasets.load_dataset_builder(source).info.features
    if features:
        row_kind(features, source)


def _check_first_row(path: Path) -> None:
    """Refuse a JSON file whose first row is null, on which pyarrow 26 crashes the process."""
    with path.open("rb") as file:
        if re.match(rb"\s*\[?\s*null\b", file.read(1024)):
            raise PrunerError(f"{path}, row 1: the row is null: give an object")


@contextmanager
def _quiet_loader() -> Iterator[None]:
    """Keep ``datasets`` from logging an error that is raised, too."""
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Turn any error of a data set's loader into a ``PrunerError`` that names the data set."""
    try:
        yield
    except PrunerError:
        raise
    except StopIteration as error:
        raise PrunerError(f"the data set {source} is empty") from error
    except Exception as error:  # the loaders of a dozen formats, and the network
        cause = error.__cause__ or error  # "An error occurred while generating the dataset" says nothing
        why = " ".join(str(cause).split())[:200]
        kind = PrunerError if Path(source).expanduser().exists() else Unavailable
        raise kind(f"cannot read the data set {source}: {type(cause).__name__}: {why}") from error


def _iterate_texts(source: str) -> Iterator[Record]:
    for document in documents(source, "train"):
        yield {"text": document}


def row_columns(data: Any, source: str) -> tuple[str, ...]:
    """Return the columns of a data set; of a stream that does not know them, those of its first row.

    Raises:
        PrunerError: a stream is empty or cannot be read.
    """
    if data.column_names:
        return tuple(data.column_names)
    with reading(source), _quiet_loader():
        first = next(iter(data), None)
    if first is None:
        raise PrunerError(f"the data set {source} is empty")
    return tuple(first)


def row_kind(columns: Iterable[str], source: str) -> RowKind:
    """Recognise the kind of a data set's rows by their columns.

    >>> row_kind(["instruction", "input", "output"], "alpaca.json")
    'instruction'

    Raises:
        PrunerError: no kind has these columns; the message lists them.
    """
    names = set(columns)
    if names & set(CHATS):
        return "chat"
    if "instruction" in names and names & set(ANSWERS):
        return "instruction"
    if names & set(QUESTIONS) and names & set(ANSWERS):
        return "pair"
    if names & set(TEXTS):
        return "text"
    raise PrunerError(
        f"{source} has the columns {', '.join(sorted(names)) or 'none'}: give instruction and output, prompt and "
        "completion, messages, or text"
    )


def read_text(row: Record, *columns: str) -> str:
    """Return the first of a row's columns that is not null, as text; ``""`` if all are null or missing.

    >>> read_text({"output": None, "response": 4}, "output", "response")
    '4'

    Raises:
        PrunerError: the value is neither a text nor a number.
    """
    for name in columns:
        value = row.get(name)
        if _is_text(value):
            return str(value)
        if value is not None:
            raise PrunerError(f"{name} is {_describe(value)}: give a text or a number")
    return ""


def read_messages(row: Record) -> list[dict[str, str]]:
    """Return the turns of a chat as ``{"role": ..., "content": ...}``; none if the chat is null.

    Roles of ShareGPT (``human``, ``gpt``) become those of chat templates, and content in parts becomes one text.

    Raises:
        PrunerError: the chat is no list, or a turn lacks its role or content or has one of another type.
    """
    for name in CHATS:
        turns = row.get(name)
        if isinstance(turns, list):
            return [_read_turn(turn, f"turn {number} of {name}") for number, turn in enumerate(turns, 1)]
        if turns is not None:
            raise PrunerError(f"{name} is {_describe(turns)}: give a list of turns, such as [{TURN}]")
    return []


def _read_turn(turn: Any, name: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise PrunerError(f"{name} is {_describe(turn)}: give an object, such as {TURN}")
    role, content = (
        next((turn[key] for key in keys if turn.get(key) is not None), None)
        for keys in (("role", "from"), ("content", "value"))
    )
    if not isinstance(role, str) or not role:
        raise PrunerError(f"the role of {name} is {_describe(role)}: give a text, such as user or assistant")
    if isinstance(content, list):
        content = "".join(_read_part(part, f"part {number} of {name}") for number, part in enumerate(content, 1))
    if not _is_text(content):
        raise PrunerError(f"the content of {name} is {_describe(content)}: give a text, or a list of text parts")
    return {"role": ROLES.get(role, role), "content": str(content)}


def _read_part(part: Any, name: str) -> str:
    """Read a part of a turn's content as chat templates have it: ``{"type": "text", "text": "Hello"}``."""
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise PrunerError(f'{name} is {_describe(part)}: give text parts, such as {{"type": "text", "text": "Hello"}}')


def _is_text(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _describe(value: Any) -> str:
    """Name a value's type as JSON does and show its beginning: ``a list (['a', 'b'])``."""
    if value is None:
        return "missing"
    if value == "":
        return "empty"
    names = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", int: "a number", float: "a number"}
    name = next((name for kind, name in names.items() if type(value) is kind), None)
    name = name or ("a date" if isinstance(value, date) else f"of type {type(value).__name__}")
    shown = repr(value)
    return f"{name} ({shown if len(shown) <= 60 else shown[:57] + '...'})"

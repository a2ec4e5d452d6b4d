"""Training rows: read them from a data set, recognise their kind by their columns, and check their values.

Four kinds of rows are recognised: chats (``messages`` or ``conversations``), instructions (``instruction``, perhaps
``input``, and ``output`` or ``response``), pairs (``prompt`` and ``completion`` or ``response``) and plain text.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from ..choices import EMBEDDED_TEXTS
from ..corpora import HUB, documents
from ..errors import PrunerError, Unavailable, in_one_line
from ..logs import least_level, log
from ..row_kinds import Record, row_kind

MAX_DOCUMENTS = 200_000  # documents of a hub text that are read without --streaming
LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


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
        data = datasets.Dataset.from_dict({"text": texts})
    else:
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
    if path.is_dir():
        raise PrunerError(f"{source} is a folder: give one of its {', '.join(LOADERS)} or .txt files")
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
    """Refuse a JSON file whose first row is null, on which pyarrow 26 crashes the process.

    ``datasets`` makes numbers null that are not finite.
    """
    with path.open("rb") as file:
        if first := re.match(rb"\s*\[?\s*(null\b|NaN\b|-?Infinity\b|-?\d[\d.]*[eE]\+?\d{3})", file.read(1024)):
            raise PrunerError(f"{path}, row 1: the row is {first[1].decode()}: give an object")


def _quiet_loader() -> AbstractContextManager[None]:
    """Keep ``datasets`` from logging an error that is raised, too."""
    return least_level("datasets", logging.CRITICAL)


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
        kind = PrunerError if Path(source).expanduser().exists() else Unavailable
        raise kind(f"cannot read the data set {source}: {in_one_line(cause)}") from error


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

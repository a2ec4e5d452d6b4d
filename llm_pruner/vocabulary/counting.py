"""Count how often each token occurs in texts of any size."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ..corpora import documents
from ..errors import PrunerError
from ..files import digest, read_json, write_text
from ..progress import Step
from ..surgery.tokenizer import Subwords

DOCUMENTS_PER_BATCH = 256  # tokenized at once, on all cores
KEEP_EVERY = 100  # batches between two writes of the counts
BLOCK = 2**18  # characters of a text file that are one document


@dataclass
class SourceCounts:
    """Counts of one source.

    Attributes:
        values: int64 ``[tokens]``, occurrences of each token.
        words: int64 ``[tokens]``, occurrences as a whole word; zeros for a tokenizer that cannot keep tokens alone.
        read: documents read so far.
        stamp: size and modification time of a file, which tell whether it was replaced.
    """

    values: np.ndarray
    words: np.ndarray
    read: int = 0
    stamp: list[int] | None = None

    @classmethod
    def empty(cls, size: int, stamp: list[int] | None) -> SourceCounts:
        return cls(np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64), 0, stamp)

    def add(self, ids: np.ndarray, marked: bool) -> None:
        """Add the tokens of a text.

        Args:
            ids: int64 ``[tokens]``.
            marked: tokens inside a word have the number of tokens added to their ids; see :meth:`Subwords.marked`.
        """
        size = len(self.values)
        inside = ids >= size
        ids = np.where(inside, ids - size, ids)
        self.values += np.bincount(ids, minlength=size)
        if marked:  # a whole word begins a word, and so does the next token
            self.words += np.bincount(ids[~(inside | np.append(inside[1:], False))], minlength=size)


@dataclass
class Counts:
    """Occurrences of each token in several sources.

    Attributes:
        size: number of tokens.
        sources: counts by the name of the source.
    """

    size: int
    sources: dict[str, SourceCounts] = field(default_factory=dict)

    @property
    def values(self) -> np.ndarray:
        """Occurrences in all sources: int64 ``[tokens]``."""
        return sum((source.values for source in self.sources.values()), np.zeros(self.size, dtype=np.int64))

    @property
    def words(self) -> np.ndarray:
        """Occurrences as a whole word in all sources: int64 ``[tokens]``."""
        return sum((source.words for source in self.sources.values()), np.zeros(self.size, dtype=np.int64))

    def source(self, name: str) -> SourceCounts:
        """Return the counts of a source so far; empty ones for a new source and for a file that was replaced."""
        path = Path(name).expanduser()
        stamp = [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None
        if name not in self.sources or self.sources[name].stamp != stamp:
            self.sources[name] = SourceCounts.empty(self.size, stamp)
        return self.sources[name]

    def save(self, file: str | Path, tokenizer: str) -> None:
        """Write the counts as JSON.

        Args:
            tokenizer: hash of the tokenizer that they were made with.
        """
        sources = {
            name: {
                "read": source.read,
                "stamp": source.stamp,
                "counts": {str(i): [int(source.values[i]), int(source.words[i])] for i in source.values.nonzero()[0]},
            }
            for name, source in self.sources.items()
        }
        document = {"tokenizer": tokenizer, "size": self.size, "sources": sources}
        write_text(Path(file), json.dumps(document, allow_nan=False) + "\n")

    @classmethod
    def load(cls, file: str | Path, tokenizer: str) -> Counts:
        """Read counts written by :meth:`save`.

        Raises:
            PrunerError: the file is damaged, or was made with another tokenizer.
        """
        document = read_json(file)
        try:
            made_with, counts = document["tokenizer"], cls(int(document["size"]))
            for name, entry in document["sources"].items():
                source = SourceCounts.empty(counts.size, entry["stamp"])
                source.read = int(entry["read"])
                for i, (occurrences, words) in entry["counts"].items():
                    source.values[int(i)], source.words[int(i)] = occurrences, words
                counts.sources[name] = source
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError) as error:
            raise PrunerError(f"cannot read the counts {file}: {error}") from error
        if made_with != tokenizer:
            raise PrunerError(f"the counts in {file} were made with another tokenizer: count again into another file")
        return counts


def count(
    tokenizer: PreTrainedTokenizerBase,
    sources: Iterable[str],
    file: str | Path | None = None,
    most: int | None = None,
) -> Counts:
    """Count the tokens of texts on all cores, document by document.

    Args:
        sources: names of data sets or files; see :mod:`llm_pruner.data`.
        file: keeps counts between runs; documents that it has counted are not read again.
        most: count at most this many documents of a data set on the hub.

    Raises:
        PrunerError: a source does not exist, or all are empty.
    """
    words = Subwords(tokenizer)
    tokenizer_hash = digest(sorted(tokenizer.get_vocab().items()))
    counts = Counts(words.size)
    if file is not None and Path(file).exists():
        counts = Counts.load(file, tokenizer_hash)
    names = list(dict.fromkeys(sources))
    marked = words.marked()
    backend = marked or whole_texts(tokenizer)
    for name in names:
        source = counts.source(name)
        unread = itertools.islice(iterate_documents(name, most), source.read, None)
        with Step(f"counting tokens of {name}, documents") as step:
            for number, batch in enumerate(_batches(unread), 1):
                encodings = backend.encode_batch_fast(batch, add_special_tokens=False)
                ids = np.fromiter(itertools.chain.from_iterable(e.ids for e in encodings), dtype=np.int64)
                source.add(ids, marked is not None)
                source.read += len(batch)
                step.advance(len(batch))
                if file is not None and number % KEEP_EVERY == 0:
                    counts.save(file, tokenizer_hash)
    requested = Counts(counts.size, {name: counts.sources[name] for name in names})
    if not requested.values.any():
        raise PrunerError("the corpus is empty: give --corpus texts to count tokens in")
    if file is not None:
        counts.save(file, tokenizer_hash)
    return requested


def whole_texts(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy of a tokenizer's backend that neither pads nor cuts texts, as those of embedding models do."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    backend.no_padding()
    backend.no_truncation()
    return backend


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(itertools.islice(texts, DOCUMENTS_PER_BATCH)):
        yield batch


def iterate_documents(source: str, most: int | None = None) -> Iterator[str]:
    """Iterate over the documents of a source; a text file comes in blocks that end with a line."""
    path = Path(source).expanduser()
    if path.suffix != ".txt" or not path.is_file():
        yield from documents(source, most=most)
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        while block := lines.readlines(BLOCK):
            yield "".join(block)

"""How often each token occurs in a text of any size."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..data import documents
from ..errors import PrunerError
from ..files import digest, read_json, write_text
from ..surgery.tokenizer import Subwords

DOCUMENTS_PER_BATCH = 256  # documents tokenized at once, on all cores
KEEP_EVERY = 100  # batches after which counts are written down
BLOCK = 2**18  # characters of a text file that count as a document


@dataclass
class Part:
    """What a source has of each token.

    Attributes:
        values: int64 ``[tokens]``, how often it occurs.
        words: int64 ``[tokens]``, how often it is a whole word; zeros for a tokenizer that needs no such thing.
        read: documents read.
        stamp: size and time of a file, by which another one of the same name is known.
    """

    values: np.ndarray
    words: np.ndarray
    read: int = 0
    stamp: list[int] | None = None

    @classmethod
    def of(cls, size: int, stamp: list[int] | None) -> Part:
        return cls(np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64), 0, stamp)


@dataclass
class Counts:
    """Occurrences of each token in several sources.

    Attributes:
        size: tokens that there are.
        parts: by the name of the source.
    """

    size: int
    parts: dict[str, Part] = field(default_factory=dict)

    @property
    def values(self) -> np.ndarray:
        """Of all sources: int64 ``[tokens]``."""
        return sum((part.values for part in self.parts.values()), np.zeros(self.size, dtype=np.int64))

    @property
    def words(self) -> np.ndarray:
        """Of all sources, as whole words: int64 ``[tokens]``."""
        return sum((part.words for part in self.parts.values()), np.zeros(self.size, dtype=np.int64))

    def part(self, source: str) -> Part:
        """What is known of a source; nothing if it is another file by now."""
        path = Path(source).expanduser()
        stamp = [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None
        if source not in self.parts or self.parts[source].stamp != stamp:
            self.parts[source] = Part.of(self.size, stamp)
        return self.parts[source]

    def save(self, file: str | Path, tokenizer: str) -> None:
        sources = {
            name: {
                "read": part.read,
                "stamp": part.stamp,
                "counts": {str(i): [int(part.values[i]), int(part.words[i])] for i in part.values.nonzero()[0]},
            }
            for name, part in self.parts.items()
        }
        write_text(Path(file), json.dumps({"tokenizer": tokenizer, "size": self.size, "sources": sources}) + "\n")

    @classmethod
    def load(cls, file: str | Path, tokenizer: str) -> Counts:
        """Raises: PrunerError: the file is damaged, or of another tokenizer."""
        content = read_json(file)
        try:
            made_with, out = content["tokenizer"], cls(int(content["size"]))
            for name, told in content["sources"].items():
                part = Part.of(out.size, told["stamp"])
                part.read = int(told["read"])
                for i, (n, words) in told["counts"].items():
                    part.values[int(i)], part.words[int(i)] = n, words
                out.parts[name] = part
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError) as error:
            raise PrunerError(f"cannot read the counts {file}: {error}") from error
        if made_with != tokenizer:
            raise PrunerError(f"the counts in {file} were made with another tokenizer: count again into another file")
        return out


def count(
    tokenizer: PreTrainedTokenizerBase,
    sources: Iterable[str],
    file: str | Path | None = None,
    most: int | None = None,
) -> Counts:
    """Count the tokens of texts, as they come, on all cores.

    Args:
        sources: names of data sets or files, as :mod:`llm_pruner.data` knows them.
        file: where counts are kept; what it says has been read is not read again.
        most: of a data set on the hub, count so many documents at most.

    Raises:
        PrunerError: there is no text, or no such source.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    words = Subwords(tokenizer)
    marked = words.marked()
    backend = marked or tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    mark = digest(sorted(tokenizer.get_vocab().items()))
    known = Counts(words.size)
    if file is not None and Path(file).exists():
        known = Counts.load(file, mark)
    asked = list(dict.fromkeys(sources))
    for source in asked:
        part = known.part(source)
        texts = itertools.islice(iterate_documents(source, most), part.read, None)
        for number in itertools.count(1):
            batch = list(itertools.islice(texts, DOCUMENTS_PER_BATCH))
            if not batch:
                break
            encoded = backend.encode_batch_fast(batch, add_special_tokens=False)
            ids = np.fromiter(itertools.chain.from_iterable(e.ids for e in encoded), dtype=np.int64)
            inside = ids >= known.size
            ids[inside] -= known.size
            part.values += np.bincount(ids, minlength=known.size)
            if marked:  # a word alone: it begins one, and so does the next
                part.words += np.bincount(ids[~(inside | np.append(inside[1:], False))], minlength=known.size)
            part.read += len(batch)
            if file is not None and number % KEEP_EVERY == 0:
                known.save(file, mark)
    found = Counts(known.size, {source: known.parts[source] for source in asked})
    if not found.values.any():
        raise PrunerError("the corpus is empty: it has no text to count tokens in")
    if file is not None:
        known.save(file, mark)
    return found


def iterate_documents(source: str, most: int | None = None) -> Iterator[str]:
    """The documents of a source one after the other; a text file in blocks that end with a line."""
    path = Path(source).expanduser()
    if path.suffix != ".txt" or not path.is_file():
        yield from documents(source, most=most)
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        while block := lines.readlines(BLOCK):
            yield "".join(block)

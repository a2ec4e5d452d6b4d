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

BATCH = 256  # documents tokenized at once, on all cores
KEEP_EVERY = 100  # batches after which counts are written down
BLOCK = 2**18  # characters of a text file that count as a document


@dataclass
class Part:
    """What a source has of each token.

    Attributes:
        values: int64 ``[tokens]``.
        read: documents read.
        stamp: size and time of a file, by which another one of the same name is known.
    """

    values: np.ndarray
    read: int = 0
    stamp: list[int] | None = None


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

    def part(self, source: str) -> Part:
        """What is known of a source; nothing if it is another file by now."""
        path = Path(source).expanduser()
        stamp = [path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else None
        if source not in self.parts or self.parts[source].stamp != stamp:
            self.parts[source] = Part(np.zeros(self.size, dtype=np.int64), 0, stamp)
        return self.parts[source]

    def save(self, file: str | Path, tokenizer: str) -> None:
        sources = {
            name: {
                "read": part.read,
                "stamp": part.stamp,
                "counts": {str(i): int(n) for i, n in enumerate(part.values) if n},
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
                part = Part(np.zeros(out.size, dtype=np.int64), int(told["read"]), told["stamp"])
                for i, n in told["counts"].items():
                    part.values[int(i)] = n
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
    backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    mark = digest(sorted(tokenizer.get_vocab().items()))
    known = Counts(len(tokenizer))
    if file is not None and Path(file).exists():
        known = Counts.load(file, mark)
    asked = list(dict.fromkeys(sources))
    for source in asked:
        part = known.part(source)
        texts = itertools.islice(streamed(source, most), part.read, None)
        for number in itertools.count(1):
            batch = list(itertools.islice(texts, BATCH))
            if not batch:
                break
            encoded = backend.encode_batch_fast(batch, add_special_tokens=False)
            ids = np.fromiter(itertools.chain.from_iterable(e.ids for e in encoded), dtype=np.int64)
            part.values += np.bincount(ids, minlength=known.size)
            part.read += len(batch)
            if file is not None and number % KEEP_EVERY == 0:
                known.save(file, mark)
    found = Counts(known.size, {source: known.parts[source] for source in asked})
    if not found.values.any():
        raise PrunerError("the corpus is empty: it has no text to count tokens in")
    if file is not None:
        known.save(file, mark)
    return found


def streamed(source: str, most: int | None = None) -> Iterator[str]:
    """The documents of a source one after the other; a text file in blocks that end with a line."""
    path = Path(source).expanduser()
    if path.suffix != ".txt" or not path.is_file():
        yield from documents(source, most=most)
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        while block := lines.readlines(BLOCK):
            yield "".join(block)

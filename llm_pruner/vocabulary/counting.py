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
from ..files import digest, write_text

BATCH = 256  # documents tokenized at once, on all cores
KEEP_EVERY = 100  # batches after which counts are written down
BLOCK = 2**18  # characters of a text file that count as a document


@dataclass
class Counts:
    """Occurrences of each token.

    Attributes:
        values: int64 ``[tokens]``.
        read: documents read of each source.
    """

    values: np.ndarray
    read: dict[str, int] = field(default_factory=dict)

    def save(self, file: str | Path, tokenizer: str) -> None:
        known = {str(i): int(n) for i, n in enumerate(self.values) if n}
        document = {"tokenizer": tokenizer, "size": len(self.values), "read": self.read}
        write_text(Path(file), json.dumps({**document, "counts": known}) + "\n")

    @classmethod
    def load(cls, file: str | Path, tokenizer: str) -> Counts:
        """Raises: PrunerError: the file is damaged, or of another tokenizer."""
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
            made_with = content["tokenizer"]
            values = np.zeros(int(content["size"]), dtype=np.int64)
            for i, n in content["counts"].items():
                values[int(i)] = n
            out = cls(values, dict(content["read"]))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError) as error:
            raise PrunerError(f"cannot read the counts {file}: {error}") from error
        if made_with != tokenizer:
            raise PrunerError(f"the counts in {file} were made with another tokenizer: count again into another file")
        return out


def count(tokenizer: PreTrainedTokenizerBase, sources: Iterable[str], file: str | Path | None = None) -> Counts:
    """Count the tokens of texts, as they come, on all cores.

    Args:
        sources: names of data sets or files, as :mod:`llm_pruner.data` knows them.
        file: where counts are kept; what it says has been read is not read again.

    Raises:
        PrunerError: there is no text, or no such source.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    backend, size = tokenizer.backend_tokenizer, len(tokenizer)  # type: ignore[attr-defined]
    mark = digest(sorted(tokenizer.get_vocab().items()))
    found = Counts(np.zeros(size, dtype=np.int64))
    if file is not None and Path(file).exists():
        found = Counts.load(file, mark)
    for source in sources:
        texts = itertools.islice(streamed(source), found.read.get(source, 0), None)
        for number in itertools.count(1):
            batch = list(itertools.islice(texts, BATCH))
            if not batch:
                break
            encoded = backend.encode_batch_fast(batch, add_special_tokens=False)
            ids = np.fromiter(itertools.chain.from_iterable(e.ids for e in encoded), dtype=np.int64)
            found.values += np.bincount(ids, minlength=size)
            found.read[source] = found.read.get(source, 0) + len(batch)
            if file is not None and number % KEEP_EVERY == 0:
                found.save(file, mark)
    if not found.values.any():
        raise PrunerError("the corpus is empty: it has no text to count tokens in")
    if file is not None:
        found.save(file, mark)
    return found


def streamed(source: str) -> Iterator[str]:
    """The documents of a source one after the other; a text file in blocks that end with a line."""
    path = Path(source).expanduser()
    if path.suffix != ".txt" or not path.is_file():
        yield from documents(source)
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        while block := lines.readlines(BLOCK):
            yield "".join(block)

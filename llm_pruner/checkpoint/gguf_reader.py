"""Parse a GGUF file once for config, tokenizer and weights; transformers parses it anew for each of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import gguf
import numpy as np


class FastReader(gguf.GGUFReader):
    """A reader that slices the mapped file as plain bytes: slices of a ``numpy.memmap`` cost three times as much."""

    def _get(
        self,
        offset: int,
        dtype: Any,
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> np.ndarray:
        kind = _ordered(dtype, override_order or self.byte_order)
        if not int(count):
            return np.empty(0, kind)
        return np.frombuffer(self.data, kind, int(count), int(offset))


@cache
def _ordered(dtype: Any, order: Literal["I", "S", "<"]) -> np.dtype:
    return np.dtype(dtype).newbyteorder(order)


@contextmanager
def parsed_once() -> Iterator[None]:
    """Let the loaders of transformers share one parse of each GGUF file within the block.

    Blocks within a block share the parse of the outermost. The loaders look the reader up in the module ``gguf`` at
    every call (checked on transformers 5.23 and gguf 0.19): two names of that module are replaced for the length of
    the block, and nothing of transformers.
    """
    if gguf.GGUFReader is not FastReader.__base__:
        yield
        return
    names = {"GGUFReader": cache(FastReader), "get_tensor_name_map": cache(gguf.get_tensor_name_map)}
    before = {name: getattr(gguf, name) for name in names}
    try:
        vars(gguf).update(names)
        yield
    finally:
        vars(gguf).update(before)

"""Token ids in configs, when the vocabulary is cut."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from ...errors import PrunerError

NAMED = re.compile(r"token_(id|ids|index)$|^force_words_ids$")  # fields whose tokens must stay
LISTED = re.compile(r"suppress_tokens$|^bad_words_ids$|^sequence_bias$")  # fields that lose removed tokens


def names_tokens(field: str) -> bool:
    """Return True if a field of a config holds token ids."""
    return bool(NAMED.search(field) or LISTED.search(field))


def ids_in(config: PreTrainedConfig | GenerationConfig) -> set[int]:
    """Return the tokens that a config names, such as the end of a text."""
    ids: set[int] = set()
    for name, value in _fields(config):
        if NAMED.search(name):
            ids.update(_flat(value))
    for inner in _inner(config):
        ids |= ids_in(inner)
    return ids


def renumber(config: PreTrainedConfig | GenerationConfig, kept: list[int]) -> None:
    """Give a config the new ids of its tokens: their places in ``kept``.

    Raises:
        PrunerError: it names a token that does not stay.
    """
    new = {old: position for position, old in enumerate(kept)}
    for name, value in _fields(config):
        if NAMED.search(name):
            removed = [i for i in _flat(value) if i not in new]
            if removed:
                raise PrunerError(f"the plan drops token {removed[0]}, which the config names as {name}: keep it")
            setattr(config, name, _all_new(value, new))
        elif name == "sequence_bias" and isinstance(value, list):  # pairs of the tokens and their bias
            moved = [[found, bias] for one, bias in value if (found := _all_new(one, new)) is not None]
            setattr(config, name, moved or None)
        elif LISTED.search(name) and isinstance(value, list):
            moved = [found for one in value if (found := _all_new(one, new)) is not None]
            setattr(config, name, moved or None)  # transformers refuses empty lists of words
    for inner in _inner(config):
        renumber(inner, kept)


def _all_new(value: Any, new: dict[int, int]) -> Any:
    """Return the new number of an id, or of nested lists of them; None if one is removed."""
    if isinstance(value, list):
        moved = [_all_new(i, new) for i in value]
        return None if any(m is None for m in moved) else moved
    return new.get(value) if _is_id(value) else value


def _flat(value: Any) -> Iterator[int]:
    """Yield an id, or the ids in nested lists."""
    if isinstance(value, list):
        for one in value:
            yield from _flat(one)
    elif _is_id(value):
        yield value


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _fields(config: Any) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(config).items() if not name.startswith("_") and value is not None]


def _inner(config: Any) -> list[PreTrainedConfig]:
    return [value for _, value in _fields(config) if isinstance(value, PreTrainedConfig)]

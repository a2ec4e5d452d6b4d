"""Token ids in configs, when the vocabulary is cut."""

from __future__ import annotations

import re
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from ...errors import PrunerError

NAMED = re.compile(r"token_(id|ids|index)$")  # fields whose tokens must stay
LISTED = re.compile(r"suppress_tokens$|^bad_words_ids$|^sequence_bias$")  # fields that lose removed tokens


def names_tokens(field: str) -> bool:
    """Return True if a field of a config holds token ids."""
    return bool(NAMED.search(field) or LISTED.search(field))


def ids_in(config: PreTrainedConfig | GenerationConfig) -> set[int]:
    """Return the tokens that a config names, such as the end of a text."""
    ids: set[int] = set()
    for name, value in _fields(config):
        if NAMED.search(name):
            ids.update(i for i in (value if isinstance(value, list) else [value]) if _is_id(i))
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
            ids = value if isinstance(value, list) else [value]
            removed = [i for i in ids if _is_id(i) and i not in new]
            if removed:
                raise PrunerError(f"the plan drops token {removed[0]}, which the config names as {name}: keep it")
            moved = [new[i] if _is_id(i) else i for i in ids]
            setattr(config, name, moved if isinstance(value, list) else moved[0])
        elif LISTED.search(name) and isinstance(value, list):
            moved = [found for one in value if (found := _all_new(one, new)) is not None]
            setattr(config, name, moved or None)  # transformers refuses empty lists of words
    for inner in _inner(config):
        renumber(inner, kept)


def _all_new(value: Any, new: dict[int, int]) -> Any:
    """Return the new number of an id, or of a list of them; None if one is removed."""
    if isinstance(value, list):
        moved = [_all_new(i, new) if isinstance(i, (int, list)) else i for i in value]
        return None if any(m is None for m in moved) else moved
    return new.get(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _fields(config: Any) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(config).items() if not name.startswith("_") and value is not None]


def _inner(config: Any) -> list[PreTrainedConfig]:
    return [value for _, value in _fields(config) if isinstance(value, PreTrainedConfig)]

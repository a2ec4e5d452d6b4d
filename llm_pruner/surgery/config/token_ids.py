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
            if removed := [i for i in _flat(value) if i not in new]:
                raise PrunerError(f"the plan drops token {removed[0]}, which the config names as {name}: keep it")
            setattr(config, name, _moved(value, new))
        elif name == "sequence_bias" and isinstance(value, list):  # pairs of the tokens and their bias
            setattr(config, name, [[_moved(ids, new), bias] for ids, bias in value if _stays(ids, new)] or None)
        elif LISTED.search(name) and isinstance(value, list):  # transformers refuses empty lists of words
            setattr(config, name, [_moved(one, new) for one in value if _stays(one, new)] or None)
    for inner in _inner(config):
        renumber(inner, kept)


def _stays(value: Any, new: dict[int, int]) -> bool:
    """Return True if an id, or all ids in nested lists, have a new number."""
    return all(i in new for i in _flat(value))


def _moved(value: Any, new: dict[int, int]) -> Any:
    """Return the new number of an id, or nested lists of them; what is no id is left as it is."""
    if isinstance(value, list):
        return [_moved(one, new) for one in value]
    return new[value] if _is_id(value) else value


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

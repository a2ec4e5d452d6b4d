"""Names of modules in a quantization config: they follow layers and experts that are renumbered or removed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Lists of names, of prefixes or suffixes of names, and of regular expressions (with ``re:``) of modules.
LISTS = ("modules_to_not_convert", "modules_to_convert", "ignored_layers", "ignore", "targets")
REGEX = "re:"
BY_MODULE = "dynamic"  # of GPTQModel: settings by regular expressions, which begin with a sign
NUMBER = re.compile(r"(?<![\w{\\])\d+(?![\w}])")


def quantization_after(quantization: Any, renamed: Mapping[str, str | None]) -> Any:
    """Return a quantization config that names the modules of the pruned model.

    Args:
        renamed: new name of every module, None for a removed one.

    >>> renamed = {"layers.0.gate": None, "layers.1.gate": "layers.0.gate", "lm_head": "lm_head"}
    >>> quantization_after({"ignore": ["lm_head", "layers.1.gate", "re:.*gate$"]}, renamed)
    {'ignore': ['lm_head', 'layers.0.gate', 're:.*gate$']}
    """
    if all(old == new for old, new in renamed.items()) or not isinstance(quantization, dict):
        return quantization
    changed: dict[str, Any] = {}
    for key, value in quantization.items():
        if key in LISTS and isinstance(value, list):
            names = [name for entry in value for name in _entry_after(entry, renamed)]
            changed[key] = list(dict.fromkeys(names))
        elif key == BY_MODULE and isinstance(value, dict):
            changed[key] = {new: own for pattern, own in value.items() for new in _pattern_after(pattern, renamed)}
        elif isinstance(value, dict):
            changed[key] = quantization_after(value, renamed)
        else:
            changed[key] = value
    return changed


def _pattern_after(pattern: str, renamed: Mapping[str, str | None]) -> list[str]:
    """Return the patterns that stand for one of GPTQModel's; those that name numbers become names of modules.

    >>> _pattern_after(r"-:layers\\.1\\.gate", {"layers.0.gate": None, "layers.1.gate": "layers.0.gate"})
    ['-:layers\\\\.0\\\\.gate$']
    """
    sign, expression = (pattern[:2], pattern[2:]) if pattern[:2] in ("+:", "-:") else ("", pattern)
    if (entries := _entry_after(f"{REGEX}{expression}", renamed)) == [f"{REGEX}{expression}"]:
        return [pattern]
    return [f"{sign}{re.escape(name)}$" for name in entries]


def _entry_after(entry: Any, renamed: Mapping[str, str | None]) -> list[Any]:
    """Return the entries that stand for an entry of a list; those that name numbers become names of modules."""
    if not isinstance(entry, str) or not NUMBER.search(entry):
        return [entry]
    if entry in renamed:
        matched = [entry]
    elif entry.startswith(REGEX):
        pattern = re.compile(entry.removeprefix(REGEX))
        matched = [name for name in renamed if pattern.match(name)]
    else:
        matched = [name for name in renamed if name.endswith(f".{entry}")]
    if not matched:  # nothing of this checkpoint
        return [entry]
    return [new for name in matched if (new := renamed[name]) is not None]

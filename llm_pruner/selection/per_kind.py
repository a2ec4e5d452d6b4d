"""Settings of a selection that may differ by kind of unit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import index
from typing import Any

from ..errors import PrunerError
from ..graph.units import KINDS

PerKind = str | Mapping[str, str]
LayerChoice = Iterable[int] | Mapping[str, Iterable[int]] | None
SCOPES = ("local", "global")


def choice_for(setting: PerKind, kind: str, default: str) -> str:
    """Return the choice for a kind of unit: the setting itself, or its entry for the kind.

    >>> choice_for("global", "neurons", "local"), choice_for({"experts": "global"}, "neurons", "local")
    ('global', 'local')
    """
    return setting if isinstance(setting, str) else setting.get(kind, default)


def check_choices(name: str, setting: PerKind, choices: Iterable[str]) -> None:
    """Refuse a choice or a kind that is not valid.

    Raises:
        PrunerError: as above.
    """
    by_kind = {} if isinstance(setting, str) else setting
    if unknown := sorted(by_kind.keys() - set(KINDS)):
        raise PrunerError(f"{name} is given for kind {unknown[0]!r}, not valid: choose from {', '.join(KINDS)}")
    for value in [setting] if isinstance(setting, str) else by_kind.values():
        if value not in choices:
            raise PrunerError(f"{name} {value!r} is not valid: choose from {', '.join(choices)}")


def layers_by_kind(layers: LayerChoice, kinds: tuple[str, ...]) -> dict[str, set[int]] | None:
    """Return the requested layers by kind; None for no restriction."""
    if layers is None:
        return None
    for chosen in layers.values() if isinstance(layers, Mapping) else [layers]:
        if not isinstance(chosen, Iterable):
            raise PrunerError(f"layers {chosen!r} is not valid: give several, such as [{chosen!r}] or range(4, 28)")
    if not isinstance(layers, Mapping):
        every = _indices(layers)
        return {kind: every for kind in kinds}
    unknown = [kind for kind in layers if kind not in KINDS]
    if unknown:
        raise PrunerError(
            f"layers are given for kind {unknown[0]!r}, which is not valid: choose from {', '.join(KINDS)}"
        )
    return {kind: _indices(chosen) for kind, chosen in layers.items()}


def _indices(layers: Iterable[Any]) -> set[int]:
    """Return layer indices as plain numbers, whatever library they come from."""
    try:
        return {index(layer) for layer in layers}
    except TypeError as error:
        raise PrunerError(f"layers are not valid ({error}): give whole numbers, such as range(4, 28)") from error

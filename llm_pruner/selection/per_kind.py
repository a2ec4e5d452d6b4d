"""Settings of a selection that may differ by kind of unit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..errors import PrunerError
from ..graph.units import KINDS

PerKind = str | Mapping[str, str]
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

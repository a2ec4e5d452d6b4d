"""The JSON file of a pruning plan: its fields, its hash, and positions as ranges.

A list of positions that several parameters share is written once, in ``positions``, and named by its place there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, StringConstraints, ValidationError

from ..errors import PrunerError
from ..files import read_json, write_text

FORMAT, VERSION = "llm-pruner plan", 1
MOST_LAYERS = 100_000  # a number of a layer beyond is damage
MOST_POSITIONS = 2**25  # in all lists of a plan, 256 MiB; a few bytes can state billions

DimNumber = Annotated[str, StringConstraints(pattern="^[0-9]{1,3}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True)


class ParameterEntry(_Entry):
    """A parameter's shape before pruning, and for each pruned dim the place of its kept positions in ``positions``."""

    shape: list[NonNegativeInt]
    kept: dict[DimNumber, NonNegativeInt]


class UnitEntry(_Entry):
    """The choice for one unit, with the scores that explain it."""

    kind: str
    layer: int | None
    size: NonNegativeInt
    kept: str
    total: float | None = None
    removed: float | None = None
    lowest_kept: float | None = None
    highest_removed: float | None = None


class PlanDocument(_Entry):
    """The contents of a plan's file, without its format, version and hash."""

    settings: dict[str, Any]
    notes: list[str]
    positions: list[str]
    parameters: dict[str, ParameterEntry]
    units: dict[str, UnitEntry]
    weights: dict[str, str] = {}
    blocks: list[str] = []


def write_document(path: str | Path, document: dict[str, Any]) -> None:
    """Write the fields of a :class:`PlanDocument` with their format, version and hash.

    Numbers of numpy and torch in the settings become plain ones, and ranges and sets lists.

    Raises:
        PrunerError: JSON has no form for a value of the settings.
    """
    try:
        settings = json.loads(json.dumps(document["settings"], default=_plain))
    except TypeError as error:
        raise PrunerError(f"the settings of the plan cannot be written to {path}: {error}") from error
    document = {"format": FORMAT, "version": VERSION, **document, "settings": settings}
    document["sha256"] = _digest(document)
    write_text(Path(path), json.dumps(document, indent=1) + "\n")


def _plain(value: Any) -> Any:
    """Return a value that JSON has no form for as one that it has."""
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return value.tolist()
    if isinstance(value, (range, set, frozenset)):
        return sorted(value)
    raise TypeError(f"{value!r} is {type(value).__name__}")


def read_document(path: str | Path, verify: bool = False) -> PlanDocument:
    """Read a plan's file.

    Args:
        verify: refuse a file that was changed since it was written.

    Raises:
        PrunerError: the file is missing, not a plan, of another version or damaged; the message names the field.
    """
    document = read_json(path)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise PrunerError(f"{path} is not a pruning plan (no format {FORMAT!r})")
    if document.get("version") != VERSION:
        raise PrunerError(f"{path} has plan version {document.get('version')}; this program reads {VERSION}")
    stated_digest = document.pop("sha256", None)
    if verify and stated_digest != _digest(document):
        raise PrunerError(f"the plan {path} was changed after it was written: its hash does not fit its contents")
    try:
        return PlanDocument.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(" ".join(str(part).split())[:80] for part in first["loc"])
        raise PrunerError(f"the plan {path} is damaged: {where}: {first['msg']}") from error


def _digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def to_ranges(positions: torch.Tensor) -> str:
    """Write sorted positions as ranges.

    >>> to_ranges(torch.tensor([0, 1, 2, 7]))
    '0-2,7'
    """
    ranges: list[str] = []
    values: Iterable[int] = positions.tolist()
    start = last = None
    for value in [*values, None]:
        if last is not None and value == last + 1:
            last = value
            continue
        if last is not None:
            ranges.append(f"{start}" if start == last else f"{start}-{last}")
        start = last = value
    return ",".join(ranges)


def from_ranges(text: str, most: int = MOST_POSITIONS) -> torch.Tensor:
    """Read the positions that :func:`to_ranges` wrote, as a sorted LongTensor.

    Raises:
        ValueError: a range is not a number or two, positions are out of order, or there are more than ``most``.

    >>> from_ranges("0-2,7")
    tensor([0, 1, 2, 7])
    """
    bounds = [part.partition("-") for part in text.split(",") if part]
    begins = np.array([int(first) for first, _, _ in bounds], dtype=np.int64)
    ends = np.array([int(last or first) + 1 for first, _, last in bounds], dtype=np.int64)
    lengths = ends - begins
    if (lengths <= 0).any() or (begins[1:] < ends[:-1]).any() or (begins[:1] < 0).any():
        raise ValueError(f"a range is empty, or positions are out of order: {text[:60]}")
    if lengths.sum(dtype=np.float64) > most:  # before memory is taken for them
        raise ValueError(f"it states more than {MOST_POSITIONS:,} positions")
    within = np.arange(int(lengths.sum())) - np.repeat(lengths.cumsum() - lengths, lengths)
    return torch.from_numpy(np.repeat(begins, lengths) + within)


def all_from_ranges(texts: Iterable[str]) -> Iterator[torch.Tensor]:
    """Read the lists of positions of a plan, :data:`MOST_POSITIONS` in all; raises as :func:`from_ranges`."""
    room = MOST_POSITIONS
    for text in texts:
        positions = from_ranges(text, room)
        room -= len(positions)
        yield positions

"""Check the result of a criterion, and turn it into one tensor of scores per unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import PrunerError
from ..graph.units import Unit
from .aggregate import aggregate, scored_dims
from .request import Request

FORMS = "{(parameter, dim): Tensor [size of dim]} or {unit.name: Tensor [unit.size]}"


def is_per_channel(criterion: str, result: Any) -> bool:
    """Return True for numbers per channel, False for scores per unit.

    Raises:
        PrunerError: the result is neither.
    """
    if not isinstance(result, Mapping):
        raise PrunerError(f"criterion {criterion!r} returned {type(result).__name__}: return {FORMS}")
    if all(isinstance(key, str) for key in result):
        return False
    pairs = all(isinstance(key, tuple) and len(key) == 2 for key in result)
    if not pairs:
        raise PrunerError(f"criterion {criterion!r} returned keys such as {next(iter(result))!r}: return {FORMS}")
    return True


def unit_scores(
    criterion: str, result: Mapping[Any, torch.Tensor], request: Request, aggregation: str
) -> dict[str, torch.Tensor]:
    """Return ``{unit.name: float64 Tensor [unit.size]}`` of every unit that the result covers.

    Raises:
        PrunerError: a tensor has another shape than its unit or dim, or a score is not a number.
    """
    per_channel = is_per_channel(criterion, result)
    ranks = {name: parameter.ndim for name, parameter in request.model.named_parameters()}
    values = {}
    for unit in request.units:
        if per_channel:
            covered = [key for key in scored_dims(unit, ranks) if key in result]
            for key in covered:
                _check_shape(criterion, unit, result[key], (len(unit.dims[key]),), f"{key[0]} dim {key[1]}")
            if covered:
                numbers = {key: result[key].detach().cpu() for key in covered}
                values[unit.name] = _check_finite(criterion, unit, aggregate(unit, numbers, ranks, aggregation))
        elif unit.name in result:
            _check_shape(criterion, unit, result[unit.name], (unit.size,), unit.name)
            values[unit.name] = _check_numbers(criterion, unit, result[unit.name].detach().cpu().double())
    return values


def _check_shape(criterion: str, unit: Unit, value: Any, shape: tuple[int, ...], place: str) -> None:
    actual = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
    if actual != list(shape):
        where = f"unit {unit.name}" if place == unit.name else f"{place} of unit {unit.name}"
        raise PrunerError(f"criterion {criterion!r} returned {actual} for {where}: return a tensor {list(shape)}")


def _check_finite(criterion: str, unit: Unit, scores: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(scores).all():
        raise PrunerError(
            f"criterion {criterion!r}: the scores of {unit.name} are not finite: the weights hold NaN or inf, or "
            "--dtype is too narrow"
        )
    return scores


def _check_numbers(criterion: str, unit: Unit, scores: torch.Tensor) -> torch.Tensor:
    """Refuse NaN; infinity means that an index must stay, minus infinity that it goes first."""
    if torch.isnan(scores).any():
        raise PrunerError(f"criterion {criterion!r} returned NaN for unit {unit.name}")
    return scores

"""The registry of criteria: those that come with the project, and those that a user registers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
from transformers import PreTrainedModel

from ..errors import PrunerError
from ..models.blockwise import Compute
from ..models.running import check_calibration
from .activation import activation
from .layers import BY_POSITION, STRATEGIES
from .magnitude import magnitude
from .scores import Dims, Salience
from .taylor import taylor


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a criterion is asked for: numbers per channel of ``slices``.

    Attributes:
        slices: dims of each parameter that a number per channel is wanted for.
        compute: where and in which dtype to compute.
        weights: weights by name, to be read one after the other.
    """

    model: PreTrainedModel
    slices: Dims
    calibration: torch.Tensor | None
    taylor: str
    compute: Compute
    weights: Iterable[tuple[str, torch.Tensor]]

    @property
    def tokens(self) -> torch.Tensor:
        return check_calibration(self.model, self.calibration)


Criterion = Callable[[Request], Salience]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A criterion in the registry.

    Attributes:
        function: gives numbers per channel; None for ``random``, which needs no weights.
        needs_calibration: True if it reads the calibration set.
        reads_only: True if it knows only the slices that read a unit.
    """

    function: Criterion | None
    needs_calibration: bool = False
    reads_only: bool = False


def _by_activation(criterion: str, r: Request) -> Salience:
    return activation(r.model, r.slices, r.tokens, criterion, r.compute)


CRITERIA: dict[str, Entry] = {
    "random": Entry(function=None),
    "l1": Entry(function=lambda r: magnitude(r.weights, r.slices, power=1)),
    "l2": Entry(function=lambda r: magnitude(r.weights, r.slices, power=2)),
    "taylor": Entry(
        function=lambda r: taylor(r.model, r.slices, r.tokens, r.taylor, r.compute), needs_calibration=True
    ),
    **{
        name: Entry(
            function=partial(_by_activation, name),
            needs_calibration=True,
            reads_only=True,
        )
        for name in ("activation", "wanda", "flap")
    },
}


def register_criterion(name: str, function: Criterion, needs_calibration: bool = True) -> None:
    """Register a criterion under a name."""
    CRITERIA[name] = Entry(function=function, needs_calibration=needs_calibration)


def check_criterion(name: str) -> str:
    """Return the name of a criterion, importing one named as ``package.module:function``.

    Raises:
        PrunerError: there is no such criterion.
    """
    if ":" in name and name not in CRITERIA:
        module, _, attribute = name.partition(":")
        try:
            register_criterion(name, getattr(import_module(module), attribute))
        except (ImportError, AttributeError, ValueError) as error:
            raise PrunerError(f"the criterion {name!r} cannot be imported: {error}") from error
    name = name if name in CRITERIA else name.lower()
    if name not in CRITERIA:
        raise PrunerError(
            f"criterion {name!r} is not valid: choose from {', '.join(CRITERIA)}, or give package.module:function"
        )
    return name


def needs_calibration(name: str) -> bool:
    """Return True if a criterion reads a calibration set."""
    if name in STRATEGIES:
        return name not in BY_POSITION
    return CRITERIA[name].needs_calibration

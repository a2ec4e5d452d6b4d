"""The registry of criteria: those that come with the project, and those that a user registers or passes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch

from ..errors import PrunerError
from .activation import activation
from .experts import OF_OUTPUT, OF_ROUTING, output_scores, routing_scores
from .layers import BY_POSITION, STRATEGIES
from .magnitude import magnitude
from .request import Criterion, Request, Result
from .taylor import taylor
from .torch_pruning import is_torch_pruning, score_groups


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A criterion in the registry.

    Attributes:
        function: maps a request to numbers per channel or scores per unit.
        needs_calibration: True if it reads the calibration set.
        needs_weights: False if a model on the meta device will do.
        skips: reason why it leaves units without scores; None if it scores every unit of a request.
        builtin: True if it comes with the project; the numbers of others are never cached, since a user edits them.
    """

    function: Criterion
    needs_calibration: bool = False
    needs_weights: bool = True
    skips: str | None = None
    builtin: bool = False


def _random(request: Request) -> Result:
    generator = torch.Generator().manual_seed(request.seed)
    return {u.name: torch.rand(u.size, generator=generator, dtype=torch.float64) for u in request.units}


def _magnitude(power: int, request: Request) -> Result:
    return magnitude(request.weights, request.dims, power)


def _taylor(request: Request) -> Result:
    return taylor(
        request.model,
        request.dims,
        request.tokens,
        request.taylor,
        compute=request.compute,
        unfinished=request.unfinished,
    )


def _activation(criterion: str, request: Request) -> Result:
    return activation(request.model, request.dims, request.tokens, criterion, compute=request.compute)


CRITERIA: dict[str, Entry] = {
    "random": Entry(function=_random, needs_weights=False, builtin=True),
    "l1": Entry(function=partial(_magnitude, 1), builtin=True),
    "l2": Entry(function=partial(_magnitude, 2), builtin=True),
    "taylor": Entry(function=_taylor, needs_calibration=True, builtin=True),
    **{
        name: Entry(
            function=partial(_activation, name),
            needs_calibration=True,
            skips="no weight reads it; use taylor",
            builtin=True,
        )
        for name in ("activation", "wanda", "flap")
    },
    **{
        name: Entry(
            function=partial(function, name), needs_calibration=True, skips="it is of no stack of experts", builtin=True
        )
        for function, names in ((routing_scores, OF_ROUTING), (output_scores, OF_OUTPUT))
        for name in names
    },
}


def register_criterion(name: str, function: Criterion, *, needs_calibration: bool = True) -> None:
    """Register a criterion of your own under a name, for ``lp.score``, ``--pruner_type``, recipes and sweeps.

    Args:
        name: name of the criterion; registering it again replaces the function.
        function: takes one :class:`llm_pruner.importance.request.Request` and returns either numbers per channel,
            ``{(parameter name, dim): Tensor [size of dim]}`` for the dims in ``request.dims``, which are then
            aggregated like the built-in ones, or scores per unit, ``{unit.name: Tensor [unit.size]}`` for the units in
            ``request.units``. Higher means more important. An instance of torch-pruning's ``Importance`` is accepted
            too.
        needs_calibration: False if the function does without a calibration set, which commands then do not load.

    Raises:
        PrunerError: the name belongs to a built-in criterion, or the function cannot be called.

    >>> import torch
    >>> import llm_pruner as lp
    >>> def largest_weight(request):
    ...     weights = dict(request.weights)
    ...     return {
    ...         (name, dim): weights[name].abs().movedim(dim, 0).flatten(1).amax(1)
    ...         for name, dims in request.dims.items()
    ...         for dim in dims
    ...         if weights[name].ndim > 1
    ...     }
    >>> lp.register_criterion("largest_weight", largest_weight, needs_calibration=False)
    """
    if name in STRATEGIES or (name in CRITERIA and CRITERIA[name].builtin):
        raise PrunerError(f"criterion name {name!r} is taken by a built-in criterion: choose another name")
    CRITERIA[name] = _entry(name, function, needs_calibration)


def _entry(name: str, function: Any, needs_calibration: bool) -> Entry:
    if is_torch_pruning(function):
        if isinstance(function, type):
            raise PrunerError(f"criterion {name!r} is a class: give an instance, {function.__name__}()")
        return Entry(
            function=partial(score_groups, function),
            needs_calibration=needs_calibration,
            skips="none of its modules is of the criterion's target_types (torch-pruning knows no stacked experts, "
            "whole layers or vocabulary)",
        )
    if not callable(function):
        raise PrunerError(f"criterion {name!r} is {type(function).__name__}, not a function of one Request")
    return Entry(function=function, needs_calibration=needs_calibration)


def check_criterion(name: str) -> str:
    """Return the name of a criterion, importing one that is named as ``package.module:function``.

    The current directory is searched first, as for ``python -m``; ``sys.path`` is left as it was.

    Raises:
        PrunerError: there is no such criterion, module or function, or the module fails when it is imported.
    """
    if ":" in name and name not in CRITERIA:
        register_criterion(name, _import_function(name))
    name = name if name in CRITERIA else name.lower()
    if name not in CRITERIA:
        raise PrunerError(
            f"criterion {name!r} is not valid: choose from {', '.join(CRITERIA)}, or give package.module:function"
        )
    return name


def resolve_criterion(criterion: str | Callable[..., Any]) -> tuple[str, Entry]:
    """Return the name and entry of a criterion given by its name or as a function.

    Raises:
        PrunerError: there is no criterion of this name, or the function cannot be called.
    """
    if isinstance(criterion, str):
        name = check_criterion(criterion)
        return name, CRITERIA[name]
    if isinstance(criterion, partial):
        name = getattr(criterion.func, "__qualname__", "partial")
    else:
        name = getattr(criterion, "__qualname__", type(criterion).__qualname__)
    return name, _entry(name, criterion, needs_calibration=False)


def needs_calibration(name: str) -> bool:
    """Return True if a criterion reads a calibration set."""
    if name in STRATEGIES:
        return name not in BY_POSITION
    return CRITERIA[name].needs_calibration


def _import_function(name: str) -> Any:
    """Import what ``package.module:function`` names."""
    path, _, attribute = name.partition(":")
    with _current_directory_importable():
        module = _import_module(name, path)
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise PrunerError(f"criterion {name!r}: module {path} ({module.__file__}) has no {attribute!r}") from None


def _import_module(name: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name and f"{path}.".startswith(f"{error.name}."):
            raise PrunerError(
                f"criterion {name!r}: there is no module {error.name}; run the command in the folder that holds it, or "
                "install it"
            ) from error
        raise PrunerError(f"criterion {name!r}: importing {path} failed: {error}") from error
    except Exception as error:  # whatever the user's module raises
        raise PrunerError(f"criterion {name!r}: importing {path} failed: {type(error).__name__}: {error}") from error


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    directory = os.getcwd()
    if directory in sys.path or "" in sys.path:
        importlib.invalidate_caches()
        yield
        return
    sys.path.insert(0, directory)
    importlib.invalidate_caches()  # a module may have been written since the directory was listed
    try:
        yield
    finally:
        sys.path.remove(directory)

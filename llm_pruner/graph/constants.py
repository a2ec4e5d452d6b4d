"""Constants that a layer receives in every call and that belong to one of its axes, such as ALiBi's slopes.

A constant freezes the axes it meets, since a smaller model would compute another constant. Where a layer *receives* the
constant and the constant belongs to the layer's heads, the model can go on computing it for all heads, and the layer
takes its part. So the heads of each layer stay an axis of their own, and keep their own slopes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import nn

from ..models.hooks import forward_hooks
from ..models.per_layer import Constant, arguments_of, hook_selecting, layer_lists
from ..models.torch_internals import without_modes
from .axes import Atom, Dim, find, flatten, freeze, leaves
from .call import Recorder, Traced

COMBINED = "combined with a constant"


@contextmanager
def selecting_constants(model: nn.Module, constants: Iterable[Constant], kept: list[int]) -> Iterator[None]:
    """Give layers only the ``kept`` indices of these constants, in that order, for the length of the block."""
    hooks = [(model.get_submodule(constant.layer), hook_selecting([(constant, kept)])) for constant in constants]
    with forward_hooks(before=hooks, with_kwargs=True):
        yield


@contextmanager
def separate_constants(model: nn.Module, recorder: Recorder, constants: list[tuple[Atom, Constant]]) -> Iterator[None]:
    """Trace each constant that enters a layer as one of the layer's own, and append it to ``constants``."""
    hooks = [
        (layer, _hook_renewing(recorder, constants, f"{path}.{i}"))
        for path, layers in layer_lists(model).items()
        for i, layer in enumerate(layers)
    ]
    with forward_hooks(before=hooks, with_kwargs=True):
        yield


def _hook_renewing(recorder: Recorder, constants: list[tuple[Atom, Constant]], path: str) -> Callable[..., Any]:
    def renew(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = arguments_of(module, args, kwargs)
        for name, value in bound.arguments.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                traced = recorder.lookup(value)
                if traced.role == "constant":
                    renewed, layer_constants = _renew(traced, path, name)
                    constants.extend(layer_constants)
                    recorder.record(renewed)
                    bound.arguments[name] = renewed.tensor
        return bound.args[1:], bound.kwargs

    return renew


def _renew(original: Traced, path: str, argument: str) -> tuple[Traced, list[tuple[Atom, Constant]]]:
    """Copy a constant with new, free atoms for its frozen axes; return the copy and the constants of these atoms."""
    with without_modes():
        tensor = original.tensor.clone()
    dims: list[Dim] = []
    constants: list[tuple[Atom, Constant]] = []
    for i, dim in enumerate(original.dims):
        atoms = flatten(dim)
        renewed = tuple(Atom(atom.size) if _renewable(atom) else atom for atom in atoms)
        for position, (new, old) in enumerate(zip(renewed, atoms, strict=True)):
            if new is not old:
                inner = prod(atom.size for atom in atoms[position + 1 :])
                constants.append((new, Constant(path, argument, i, new.size, inner)))
        dims.append(renewed)
    return Traced(tensor, dims, "constant"), constants


def _renewable(atom: Atom) -> bool:
    """Return True if a constant's axis is frozen and no part of it occurs twice, as the halves of rotary tables do."""
    parts = leaves([atom])
    in_line = atom.concatenated or not atom.parts
    return (
        in_line
        and sum(part.size for part in parts) == atom.size
        and all(part.frozen for part in parts if part.size > 1)
    )


def by_leaf(constants: Iterable[tuple[Atom, Constant]]) -> dict[int, list[Constant]]:
    """Return the constants of every leaf; an axis refined since (heads into groups and members) has one per factor."""
    constants_of: dict[int, list[Constant]] = {}
    for atom, constant in constants:
        factors = flatten([atom])
        for i, factor in enumerate(factors):
            if factor.parts:  # in pieces by now, each of which would need a part of its own
                freeze([factor], COMBINED)
                continue
            inner = constant.inner * prod(f.size for f in factors[i + 1 :])
            one = Constant(constant.layer, constant.argument, constant.dim, factor.size, inner)
            constants_of.setdefault(id(find(factor)), []).append(one)
    return constants_of

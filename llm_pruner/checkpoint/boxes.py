"""Place stored tensors within the tensors of a model: one stored tensor per expert, or one for a part of a projection.

Which stored tensors make up a model's tensor, and how, is transformers' own record of each architecture.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ..errors import PrunerError
from ..selection.plan import PruningPlan

Shape = tuple[int, ...]
Span = tuple[int, int]  # a dim of a stored tensor, and where it begins in the dim of the model's tensor


class OtherForm(PrunerError):
    """A checkpoint holds its tensors in a form that cannot be placed within the model's tensors."""


def whole(shape: Shape) -> tuple[Span, ...]:
    """Return the dims of the :class:`Box` of a stored tensor that is the model's tensor, dim by dim."""
    return tuple((dim, 0) for dim in range(len(shape)))


@dataclass(frozen=True, kw_only=True)
class Box:
    """Place of a stored tensor within a tensor of a model.

    Attributes:
        parameter: name of the model's tensor.
        shape: shape of the stored tensor.
        dims: for every dim of the model's tensor an index, or the dim of the stored tensor that lies there and the
            position at which it begins.
    """

    parameter: str
    shape: Shape
    dims: tuple[int | Span, ...]

    @property
    def is_whole(self) -> bool:
        """Return True if the stored tensor is the model's tensor, dim by dim."""
        return self.dims == whole(self.shape)

    @property
    def numbers(self) -> list[int]:
        """Return the indices that the stored tensor has in stacks, such as the number of an expert."""
        return [place for place in self.dims if isinstance(place, int)]

    def kept(self, plan: PruningPlan, canonical: str) -> dict[int, torch.Tensor] | None:
        """Return the positions that a plan keeps by the stored tensor's dims; None if the plan removes the tensor.

        Args:
            canonical: name under which the plan knows the model's tensor.
        """
        positions: dict[int, torch.Tensor] = {}
        for dim, chosen in plan.kept.get(canonical, {}).items():
            place = self.dims[dim]
            if isinstance(place, int):
                if not bool((chosen == place).any()):
                    return None
                continue
            stored, start = place
            inside = chosen[(chosen >= start) & (chosen < start + self.shape[stored])] - start
            if len(inside) < self.shape[stored]:
                positions[stored] = inside
        return positions

    def numbers_after(self, plan: PruningPlan, canonical: str) -> list[int]:
        """Return :attr:`numbers` after a plan that keeps the stored tensor."""
        kept = plan.kept.get(canonical, {})
        return [
            int((kept[dim] < place).sum()) if dim in kept else place
            for dim, place in enumerate(self.dims)
            if isinstance(place, int)
        ]

    def fill(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        """Write the values of the stored tensor to their place in the model's tensor."""
        for dim in reversed(range(len(self.dims))):
            place = self.dims[dim]
            if isinstance(place, int):
                tensor = tensor.select(dim, place)
            else:
                tensor = tensor.narrow(dim, place[1], self.shape[place[0]])
        order = [place[0] for place in self.dims if not isinstance(place, int)]
        tensor.copy_(values.permute(order))


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A stored tensor on its way into a model's tensor: its place in the tensor that the conversion has made so far."""

    name: str
    shape: Shape
    dims: tuple[int | Span, ...]


def boxes_of(model: PreTrainedModel, shapes: Mapping[str, Shape]) -> dict[str, Box]:
    """Return the place of every stored tensor that transformers reads into a model, by name.

    Args:
        model: model on the meta device.
        shapes: shapes of the stored tensors, quantized weights as one tensor each.

    Raises:
        OtherForm: transformers makes a tensor from them in a way that has no places, or their names do not tell them.
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    boxes: dict[str, Box] = {}
    gathered: dict[tuple[str, int], dict[str, list[str]]] = {}
    converters, place_of = _conversion(model)
    for name, shape in shapes.items():
        parameter, number, pattern = (name, None, "") if name in own else place_of(name)
        if parameter not in own:
            continue
        if number is None:
            boxes[name] = Box(parameter=parameter, shape=shape, dims=whole(shape))
        else:
            gathered.setdefault((parameter, number), {}).setdefault(pattern, []).append(name)
    for (parameter, number), sources in gathered.items():
        converter = converters[number]
        if len(converter.target_patterns) > 1:
            raise OtherForm(f"{next(iter(sources.values()))[0]} is split into several tensors of {parameter}'s layer")
        for piece in _place(converter, parameter, sources=sources, shapes=shapes, expected=own[parameter]):
            boxes[piece.name] = Box(parameter=parameter, shape=piece.shape, dims=piece.dims)
    for name, box in boxes.items():
        if numbers_in(name) != numbers_in(box.parameter) + box.numbers:
            raise OtherForm(f"the numbers in {name} do not say its place in {box.parameter}")
    return boxes


def _conversion(model: PreTrainedModel) -> tuple[list[Any], Any]:
    """Return transformers' converters of a model, and a function from a stored name to its place among them.

    Gathers the private names of transformers' loader; checked on 5.23.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: i for i, converter in enumerate(converters) for pattern in converter.source_patterns}
    own = model.state_dict()

    def place_of(name: str) -> tuple[str, int | None, str]:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        return renamed, None if pattern is None else by_pattern[pattern], pattern or ""

    return converters, place_of


def _place(
    converter: Any, parameter: str, *, sources: Mapping[str, list[str]], shapes: Mapping[str, Shape], expected: Shape
) -> list[_Piece]:
    """Follow stored tensors through a conversion; return their places in the model's tensor.

    Args:
        sources: names of the stored tensors by the converter's patterns.
        expected: shape of the model's tensor.

    Raises:
        OtherForm: an operation is not known, or the result has another shape.
    """
    pieces: dict[str, list[_Piece]] = {}
    sizes: dict[str, list[int]] = {}
    for pattern in converter.source_patterns:
        names = sorted(sources.get(pattern, []), key=numbers_in)
        if names:
            sizes[pattern] = list(shapes[names[0]])
            pieces[pattern] = [_Piece(name=name, shape=shapes[name], dims=whole(shapes[name])) for name in names]
    for operation in converter.operations:
        kind = type(operation).__name__
        if kind == "MergeModulelist":
            for pattern, members in pieces.items():
                sizes[pattern].insert(operation.dim, len(members))
                pieces[pattern] = [
                    replace(piece, dims=(*piece.dims[: operation.dim], i, *piece.dims[operation.dim :]))
                    for i, piece in enumerate(members)
                ]
        elif kind == "Concatenate" and operation.num_shards_attribute is None:
            pieces, sizes = _concatenated(pieces, sizes, operation.dim)
        elif kind == "Transpose" and not operation.check_dims:
            for pattern, members in pieces.items():
                a, b = operation.dim0, operation.dim1
                sizes[pattern] = _swapped(sizes[pattern], a, b)
                pieces[pattern] = [replace(piece, dims=tuple(_swapped(piece.dims, a, b))) for piece in members]
        else:
            raise OtherForm(f"{parameter} is made by {kind} from {next(iter(sources.values()))[0]} and others")
    ((_, members),), ((_, size),) = pieces.items(), sizes.items()
    if tuple(size) != expected:
        raise OtherForm(f"{parameter} is {list(expected)}, and its stored tensors make {size}")
    return members


def _concatenated(
    pieces: dict[str, list[_Piece]], sizes: dict[str, list[int]], dim: int
) -> tuple[dict[str, list[_Piece]], dict[str, list[int]]]:
    """Lay the tensors of all patterns one after the other along a dim."""
    laid: list[_Piece] = []
    start = 0
    for pattern, members in pieces.items():
        for piece in members:
            place = piece.dims[dim]
            moved = place + start if isinstance(place, int) else (place[0], place[1] + start)
            laid.append(replace(piece, dims=(*piece.dims[:dim], moved, *piece.dims[dim + 1 :])))
        start += sizes[pattern][dim]
    first = next(iter(sizes.values()))
    return {"": laid}, {"": [*first[:dim], start, *first[dim + 1 :]]}


def _swapped(dims: Iterable[Any], a: int, b: int) -> list[Any]:
    swapped = list(dims)
    swapped[a], swapped[b] = swapped[b], swapped[a]
    return swapped


def numbers_in(name: str) -> list[int]:
    """Return the parts of a tensor's name that are numbers: layer, expert.

    >>> numbers_in("model.layers.3.mlp.experts.17.gate_proj.weight")
    [3, 17]
    """
    return [int(part) for part in name.split(".") if part.isdecimal()]


def with_numbers(name: str, numbers: Iterable[int]) -> str:
    """Return a name with other numbers in the places of its own.

    >>> with_numbers("model.layers.3.mlp.experts.17.gate_proj.weight", [2, 9])
    'model.layers.2.mlp.experts.9.gate_proj.weight'
    """
    others = iter(numbers)
    return re.sub(r"(?<![^.])\d+(?![^.])", lambda _: str(next(others)), name)

"""Quantized weights: the stored tensors of each, their values, and the cuts that leave every value as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import lcm

import torch

from ...errors import PrunerError

VALUES_AT_ONCE = 2**24  # values of a weight that are dequantized together
Dim = tuple[int, int] | None
Decode = Callable[[Mapping[str, torch.Tensor], tuple[int, ...]], torch.Tensor]


class InsideBlock(PrunerError):
    """A cut of a quantized weight that falls between the values of one scale or of one packed number."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One stored tensor of a quantized weight.

    Attributes:
        name: name in the files.
        dims: for every dim of the tensor, the dim of the weight that it runs along and the indices of the weight per
            index (the block of a scale, the values in a packed number); None for a dim that no cut changes.
        holds_shape: True for a tensor that states the shape of the weight.
        is_prefix: True for a tensor that a cut shortens to its first numbers, as one that counts groups.
    """

    name: str
    dims: tuple[Dim, ...]
    holds_shape: bool = False
    is_prefix: bool = False


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A quantized weight.

    Attributes:
        name: name that the weight has in an unquantized checkpoint.
        shape: shape of its values.
        parts: tensors that its values are computed from, by role.
        decode: function from rows of these tensors, and the shape of their values, to the values in float32.
        beside: tensors that go with the weight, such as the scale of its inputs.
    """

    name: str
    shape: tuple[int, ...]
    parts: dict[str, Part]
    decode: Decode
    beside: tuple[Part, ...] = ()

    @property
    def tensors(self) -> list[Part]:
        """Return all stored tensors of the weight."""
        return [*self.parts.values(), *self.beside]

    def blocks(self, dim: int) -> set[int]:
        """Return the numbers of consecutive indices of a dim that share a scale or a packed number, 1 left out."""
        return {along[1] for part in self.tensors for along in part.dims if along and along[0] == dim} - {1}


def dequantize(weight: Weight, read: Callable[[str], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return the values of a weight, computed in float32, a few million at a time.

    Args:
        read: function that reads a stored tensor by name.
    """
    stored = {role: read(part.name) for role, part in weight.parts.items()}
    values = torch.empty(weight.shape, dtype=dtype)
    block = lcm(*weight.blocks(0))
    step = block * max(VALUES_AT_ONCE // (max(values[:1].numel(), 1) * block), 1)
    for start in range(0, weight.shape[0], step):
        rows = min(step, weight.shape[0] - start)
        chunk = {role: _rows_of(stored[role], part, start, rows) for role, part in weight.parts.items()}
        values[start : start + rows] = weight.decode(chunk, (rows, *weight.shape[1:]))
    return values


def _rows_of(tensor: torch.Tensor, part: Part, start: int, rows: int) -> torch.Tensor:
    """Return the part of a stored tensor that belongs to some rows of its weight, which begin and end with blocks."""
    for dim, along in enumerate(part.dims):
        if along is not None and along[0] == 0:
            first = start // along[1]
            return tensor.narrow(dim, first, -(-(start + rows) // along[1]) - first)
    return tensor


def spread(scale: torch.Tensor, part: Part, shape: tuple[int, ...]) -> torch.Tensor:
    """Repeat scales along their blocks; return them in the weight's dims, of its shape or broadcasting to it.

    >>> scale = Part(name="scale", dims=((0, 2), (1, 3)))
    >>> spread(torch.tensor([[1, 2], [3, 4]]), scale, (3, 4))
    tensor([[1, 1, 1, 2],
            [1, 1, 1, 2],
            [3, 3, 3, 4]])
    """
    place = {along[0]: dim for dim, along in enumerate(part.dims) if along is not None}
    scale = scale.squeeze([dim for dim, along in enumerate(part.dims) if along is None])
    order = sorted(place)
    scale = scale.permute([sorted(place.values()).index(place[dim]) for dim in order])
    for position, dim in enumerate(order):
        along = part.dims[place[dim]]
        if along is not None and along[1] > 1:
            scale = scale.repeat_interleave(along[1], position).narrow(position, 0, shape[dim])
    return scale.reshape([shape[dim] if dim in place else 1 for dim in range(len(shape))])


def cut_part(weight: Weight, part: Part, tensor: torch.Tensor, kept: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Return the kept part of a stored tensor of a weight; a tensor that states a shape states the new one.

    Args:
        kept: kept positions by dim of the weight.

    Raises:
        InsideBlock: a block is kept in part.
    """
    if part.holds_shape:
        sizes = [len(kept[dim]) if dim in kept else size for dim, size in enumerate(weight.shape)]
        return torch.tensor(sizes, dtype=tensor.dtype)
    positions = part_positions(weight, part, kept)
    for dim, chosen in positions.items():
        tensor = tensor.index_select(dim, chosen)
    return tensor.contiguous() if positions else tensor.clone()


def part_positions(weight: Weight, part: Part, kept: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Return the kept positions of a stored tensor by its dims, from those of its weight.

    Raises:
        InsideBlock: a block is kept in part.

    >>> scale = Part(name="scale", dims=((0, 2), None))
    >>> weight = Weight(name="w", shape=(5, 4), parts={"scale": scale}, decode=dict)
    >>> part_positions(weight, scale, {0: torch.tensor([0, 1, 4])})
    {0: tensor([0, 2])}
    """
    positions = {}
    for dim, along in enumerate(part.dims):
        if along is None or along[0] not in kept:
            continue
        chosen, block, size = kept[along[0]], along[1], weight.shape[along[0]]
        indices, counts = torch.unique_consecutive(chosen // block, return_counts=True)
        if not torch.equal(counts, (size - indices * block).clamp(max=block)):
            raise InsideBlock(f"{part.name} holds one number for {block} values, and the plan keeps some of them only")
        positions[dim] = torch.arange(len(indices)) if part.is_prefix else indices
    return positions

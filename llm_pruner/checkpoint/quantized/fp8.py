"""FP8 with scales of blocks, as DeepSeek-V3 and Qwen3 store it: ``NAME`` and ``NAME_scale_inv``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ...errors import PrunerError
from ..shards import Shards
from .decoding import scale_values
from .weights import Dim, Part, Weight, spread

SCALE = "_scale_inv"
OF_INPUTS = ("activation_scale", "input_scale")  # static scales of what a module reads
FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)


def fp8_weights(shards: Shards, quantization: Mapping[str, Any]) -> Iterator[Weight]:
    """Yield the weights that have scales.

    Raises:
        PrunerError: a scale has no weight or another shape than the config says.
    """
    blocks = quantization.get("weight_block_size")
    for name in shards.tensors:
        if not name.endswith(SCALE):
            continue
        weight = name.removesuffix(SCALE)
        if weight not in shards.tensors:
            raise PrunerError(f"{shards.folder} lacks {weight}, whose scales it holds: the checkpoint is incomplete")
        shape = shards.tensors[weight].shape
        if shards.tensors[weight].dtype not in FLOATS:
            raise PrunerError(f"{weight} is {shards.tensors[weight].dtype} and not FP8: its format is not supported")
        parts = {
            "values": Part(name=weight, dims=tuple((dim, 1) for dim in range(len(shape)))),
            "scale": Part(name=name, dims=_scale_dims(shards, name, shape, blocks)),
        }
        module = weight.rpartition(".")[0]
        beside = [f"{module}.{one}" for one in OF_INPUTS if f"{module}.{one}" in shards.tensors]
        yield Weight(
            name=weight,
            shape=shape,
            parts=parts,
            decode=_decoder(parts["scale"]),
            beside=tuple(Part(name=one, dims=(None,) * len(shards.tensors[one].shape)) for one in beside),
        )


def _decoder(scale: Part) -> Any:
    def decode(chunk: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        return chunk["values"].float() * spread(scale_values(chunk["scale"]), scale, shape)

    return decode


def _scale_dims(shards: Shards, name: str, shape: tuple[int, ...], blocks: list[int] | None) -> tuple[Dim, ...]:
    """Return the dims of a weight's scales: one for every block of its last two dims, or one for all."""
    stored = shards.tensors[name].shape
    expected: tuple[int, ...] = () if len(stored) == 0 else (1,)
    dims: tuple[Dim, ...] = (None,) * len(stored)
    if blocks:
        sizes = [1] * (len(shape) - 2) + list(blocks)
        expected = tuple(-(-size // block) for size, block in zip(shape, sizes, strict=True))
        dims = tuple(
            None if 1 < block >= size else (dim, block)
            for dim, (size, block) in enumerate(zip(shape, sizes, strict=True))
        )
    if stored != expected:
        raise PrunerError(
            f"{name} in {shards.tensors[name].file} is {list(stored)}; a weight {list(shape)} with "
            f"{f'blocks of {blocks[0]} x {blocks[1]}' if blocks else 'one scale'} needs {list(expected)}"
        )
    return dims

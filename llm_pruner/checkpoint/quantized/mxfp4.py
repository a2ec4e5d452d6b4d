"""MXFP4 as in gpt-oss: ``NAME_blocks``, 16 bytes for 32 values, and ``NAME_scales``, a power of two for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ...errors import PrunerError
from ..shards import Shards
from .decoding import fp4_values, scale_values
from .weights import Part, Weight

BLOCKS, SCALES = "_blocks", "_scales"
BLOCK = 32  # values of one scale


def mxfp4_weights(shards: Shards, quantization: Mapping[str, Any]) -> Iterator[Weight]:
    """Yield the stacked experts, which a model holds with their last two dims transposed.

    Raises:
        PrunerError: blocks lack their scales or scales their blocks, or their shapes differ.
    """
    for name, other in ((BLOCKS, SCALES), (SCALES, BLOCKS)):
        for stored in shards.tensors:
            if stored.endswith(name) and stored.removesuffix(name) + other not in shards.tensors:
                missing = stored.removesuffix(name) + other
                raise PrunerError(
                    f"{shards.folder} lacks {missing}, which {stored} needs: the checkpoint is incomplete"
                )
    for stored in shards.tensors:
        if not stored.endswith(BLOCKS):
            continue
        weight = stored.removesuffix(BLOCKS)
        shape, scales = shards.tensors[stored].shape, shards.tensors[weight + SCALES]
        if scales.shape != shape[:-1] or len(shape) != 4 or shape[-1] * 2 != BLOCK:
            raise PrunerError(
                f"{weight + SCALES} in {scales.file} is {list(scales.shape)}; blocks {list(shape)} need one scale "
                f"for every {BLOCK // 2} bytes: {list(shape[:-1])}"
            )
        experts, rows, groups, _ = shape
        yield Weight(
            name=weight,
            shape=(experts, groups * BLOCK, rows),
            parts={
                "blocks": Part(name=stored, dims=((0, 1), (2, 1), (1, BLOCK), None)),
                "scales": Part(name=weight + SCALES, dims=((0, 1), (2, 1), (1, BLOCK))),
            },
            decode=_decode,
        )


def _decode(chunk: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    values = fp4_values(chunk["blocks"]) * scale_values(chunk["scales"]).unsqueeze(-1)
    return values.flatten(-2).transpose(-1, -2)

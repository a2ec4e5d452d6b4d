"""AWQ: ``qweight``, 4-bit integers packed along the outputs, with ``scales`` and ``qzeros`` of groups of inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ...errors import PrunerError
from ..shards import Shards
from .decoding import packed_integers
from .gptq import SUFFIX, check_parts
from .weights import Part, Weight, spread

BITS, PER = 4, 8
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # of the packed integers, by output


def awq_weights(shards: Shards, quantization: Mapping[str, Any]) -> Iterator[Weight]:
    """Yield the weights that are packed.

    Raises:
        PrunerError: the version is not read, a tensor is missing, or its shape is not what the config says.
    """
    version = str(quantization.get("version", "gemm")).lower()
    bits = quantization.get("bits", quantization.get("w_bit", BITS))
    if bits != BITS or version != "gemm":
        raise PrunerError(
            f"{shards.folder}: AWQ with {bits} bits and the version {version} is not read: 4 and gemm are"
        )
    for stored in shards.tensors:
        if not stored.endswith(SUFFIX):
            continue
        module = stored.removesuffix(SUFFIX)
        inputs, packed = shards.tensors[stored].shape
        size = quantization.get("group_size", quantization.get("q_group_size", 128))
        group = inputs if size in (-1, None) else size
        groups = -(-inputs // group)
        check_parts(shards, module, {"scales": (groups, packed * PER), "qzeros": (groups, packed)})
        parts = {
            "values": Part(name=stored, dims=((1, 1), (0, PER))),
            "scale": Part(name=f"{module}.scales", dims=((1, group), (0, 1))),
            "zero": Part(name=f"{module}.qzeros", dims=((1, group), (0, PER))),
        }
        yield Weight(
            name=f"{module}.weight", shape=(packed * PER, inputs), parts=parts, decode=_decoder(parts["scale"])
        )


def _decoder(scale: Part) -> Any:
    def decode(chunk: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        zero = spread(_integers(chunk["zero"]).float(), scale, shape)
        return (_integers(chunk["values"]).T.float() - zero) * spread(chunk["scale"].float(), scale, shape)

    return decode


def _integers(packed: torch.Tensor) -> torch.Tensor:
    """Return the integers of packed rows, in the order of the outputs."""
    rows = len(packed)
    return packed_integers(packed, BITS).view(rows, -1, PER)[:, :, list(ORDER)].view(rows, -1)

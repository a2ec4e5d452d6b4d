"""GPTQ: ``qweight``, integers packed along the inputs, with ``scales`` and ``qzeros`` of groups of inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ...errors import PrunerError
from ..shards import Shards
from .decoding import packed_integers
from .weights import Part, Weight, spread

SUFFIX = ".qweight"


def gptq_weights(shards: Shards, quantization: Mapping[str, Any]) -> Iterator[Weight]:
    """Yield the weights that are packed.

    Raises:
        PrunerError: the bits are not read, a tensor is missing, or its shape is not what the config says.
    """
    bits = quantization.get("bits", 4)
    if bits not in (2, 4, 8):
        raise PrunerError(f"{shards.folder}: GPTQ with {bits} bits is not read: 2, 4 and 8 are")
    offset = 0 if quantization.get("checkpoint_format") == "gptq_v2" else 1  # added to zero points
    per = 32 // bits
    for stored in shards.tensors:
        if not stored.endswith(SUFFIX):
            continue
        module = stored.removesuffix(SUFFIX)
        packed, outputs = shards.tensors[stored].shape
        inputs = packed * per
        group = inputs if quantization.get("group_size", -1) in (-1, None) else quantization["group_size"]
        groups = -(-inputs // group)
        check_parts(shards, module, {"scales": (groups, outputs), "qzeros": (groups, -(-outputs // per))})
        parts = {
            "values": Part(name=stored, dims=((1, per), (0, 1))),
            "scale": Part(name=f"{module}.scales", dims=((1, group), (0, 1))),
            "zero": Part(name=f"{module}.qzeros", dims=((1, group), (0, per))),
        }
        beside = []
        if f"{module}.g_idx" in shards.tensors:
            # In the order of activations, the inputs of a group lie anywhere: none can go.
            ordered = not torch.equal(shards.read(f"{module}.g_idx"), torch.arange(inputs, dtype=torch.int32) // group)
            index = Part(name=f"{module}.g_idx", dims=((1, inputs if ordered else 1),), is_prefix=not ordered)
            if ordered:
                parts["index"] = index
            else:
                beside.append(index)
        yield Weight(
            name=f"{module}.weight",
            shape=(outputs, inputs),
            parts=parts,
            decode=_decoder(parts, bits, offset),
            beside=tuple(beside),
        )


def check_parts(shards: Shards, module: str, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a packed weight whose other tensors are missing or have other shapes.

    Raises:
        PrunerError: as above.
    """
    for suffix, shape in expected.items():
        place = shards.tensors.get(f"{module}.{suffix}")
        if place is None:
            raise PrunerError(f"{shards.folder} lacks {module}.{suffix}: the checkpoint is incomplete")
        if place.shape != shape:
            raise PrunerError(
                f"{module}.{suffix} in {place.file} is {list(place.shape)}; the config's groups need {list(shape)}"
            )


def _decoder(parts: Mapping[str, Part], bits: int, offset: int) -> Any:
    def decode(chunk: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        values = packed_integers(chunk["values"].T.contiguous(), bits)[:, : shape[1]].float()
        zeros = packed_integers(chunk["zero"], bits)[:, : shape[0]] + offset & 2**bits - 1
        if "index" in chunk:
            groups = chunk["index"].long()
            return (values - zeros.T[:, groups].float()) * chunk["scale"].T[:, groups].float()
        zero = spread(zeros.float(), parts["scale"], shape)
        return (values - zero) * spread(chunk["scale"].float(), parts["scale"], shape)

    return decode

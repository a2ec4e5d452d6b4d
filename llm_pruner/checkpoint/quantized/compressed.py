"""compressed-tensors, as LLM-Compressor stores it: FP8, INT8, packed INT4, NVFP4 and MXFP4, beside ``weight_scale``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ...errors import PrunerError
from ..shards import Shards
from .decoding import fp4_values, packed_integers, scale_values
from .fp8 import FLOATS
from .weights import Dim, Part, Weight, spread

SCALE = ".weight_scale"
UNREADABLE = ("weight_g_idx", "compressed", "bitmask", "meta")  # activation order, sparsity
OF_INPUTS = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")


def compressed_weights(shards: Shards, quantization: Mapping[str, Any]) -> Iterator[Weight]:
    """Yield the weights that have scales.

    The forms of packed and unpacked values are told by the stored tensors, so that a config may mix them; the sizes of
    blocks are the config's.

    Raises:
        PrunerError: a form is not supported, a tensor is missing, or its shape is not what the config says.
    """
    if (quantization.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise PrunerError(f"{shards.folder} holds sparse weights of compressed-tensors, which are not supported")
    for name in shards.tensors:
        if name.endswith(".weight_packed") and name.replace(".weight_packed", SCALE) not in shards.tensors:
            missing = name.replace(".weight_packed", SCALE)
            raise PrunerError(f"{shards.folder} lacks {missing}, which {name} needs: the checkpoint is incomplete")
        if name.endswith(SCALE):
            yield _Module(shards, name.removesuffix(SCALE), quantization).weight()


class _Module:
    """The stored tensors of one quantized module."""

    def __init__(self, shards: Shards, name: str, quantization: Mapping[str, Any]):
        self.shards, self.name = shards, name
        groups = quantization.get("config_groups") or {}
        self.schemes = [group["weights"] for group in groups.values() if group.get("weights")]
        for suffix in UNREADABLE:
            if self.has(suffix):
                raise PrunerError(f"{name}.{suffix}: this form of compressed-tensors is not supported")

    def has(self, suffix: str) -> bool:
        return f"{self.name}.{suffix}" in self.shards.tensors

    def shape_of(self, suffix: str) -> tuple[int, ...]:
        return self.shards.tensors[f"{self.name}.{suffix}"].shape

    def weight(self) -> Weight:
        """Return the weight of the module.

        Raises:
            PrunerError: as :func:`compressed_weights`.
        """
        parts, shape, bits = self._values()
        parts["scale"] = self._part("weight_scale", self._scale_dims(shape))
        if self.has("weight_zero_point"):
            parts["zero"] = self._zero_point(parts["scale"], bits)
        if self.has("weight_global_scale"):
            parts["global"] = self._part("weight_global_scale", (None,) * len(self.shape_of("weight_global_scale")))
        beside = [self._part(one, (None,) * len(self.shape_of(one))) for one in OF_INPUTS if self.has(one)]
        if self.has("weight_shape"):
            beside.append(Part(name=f"{self.name}.weight_shape", dims=(None,), holds_shape=True))
        return Weight(
            name=f"{self.name}.weight",
            shape=shape,
            parts=parts,
            decode=_decoder(parts, bits),
            beside=tuple(beside),
        )

    def _part(self, suffix: str, dims: tuple[Dim, ...]) -> Part:
        return Part(name=f"{self.name}.{suffix}", dims=dims)

    def _values(self) -> tuple[dict[str, Part], tuple[int, ...], int]:
        """Return the part that holds the values, the shape of the weight, and the bits of a packed integer or 0."""
        if self.has("weight"):
            place = self.shards.tensors[f"{self.name}.weight"]
            if place.dtype not in (*FLOATS, torch.int8):
                raise PrunerError(
                    f"{self.name}.weight is {place.dtype} beside {self.name}{SCALE}: weights are read in FP8, INT8 "
                    "and packed"
                )
            return {"values": self._part("weight", ((0, 1), (1, 1)))}, place.shape, 0
        if not self.has("weight_packed"):
            raise PrunerError(
                f"{self.shards.folder} lacks {self.name}.weight, whose scales it holds: the checkpoint is incomplete"
            )
        place = self.shards.tensors[f"{self.name}.weight_packed"]
        rows, columns = place.shape
        if place.dtype is torch.uint8:
            return {"values": self._part("weight_packed", ((0, 1), (1, 2)))}, (rows, 2 * columns), 0
        if not self.has("weight_shape"):
            raise PrunerError(f"{self.shards.folder} lacks {self.name}.weight_shape: the checkpoint is incomplete")
        rows, width = self.shards.read(f"{self.name}.weight_shape").tolist()
        for bits in sorted({scheme.get("num_bits") for scheme in self.schemes if 32 % scheme.get("num_bits", 3) == 0}):
            if place.shape == (rows, -(-width * bits // 32)):
                return {"values": self._part("weight_packed", ((0, 1), (1, 32 // bits)))}, (rows, width), bits
        raise PrunerError(
            f"{self.name}.weight_packed in {place.file} is {list(place.shape)}, which is no weight [{rows}, {width}] "
            "of the config's bits"
        )

    def _scale_dims(self, shape: tuple[int, ...]) -> tuple[Dim, ...]:
        """Return the dims of the scales by the strategy of the config that gives their shape."""
        stored, allowed = self.shape_of("weight_scale"), []
        for scheme in self.schemes:
            for sizes in _blocks(scheme, shape):
                expected = tuple(-(-size // block) for size, block in zip(shape, sizes, strict=True))
                whole = scheme.get("strategy") == "tensor"
                if stored == expected or (whole and torch.Size(stored).numel() == 1):
                    dims = [
                        None if whole or block >= size else (dim, block)
                        for dim, (size, block) in enumerate(zip(shape, sizes, strict=True))
                    ]
                    return tuple(dims[: len(stored)])
                allowed.append(list(expected))
        raise PrunerError(
            f"{self.name}{SCALE} in {self.shards.tensors[self.name + SCALE].file} is {list(stored)}; the config's "
            f"groups give a weight {list(shape)} scales of {' or '.join(map(str, allowed)) or 'no shape'}"
        )

    def _zero_point(self, scale: Part, bits: int) -> Part:
        """Return the part of zero points: one per scale, packed along rows where the values are packed."""
        dims = list(scale.dims)
        if bits and dims[:1] == [(0, 1)]:
            dims[0] = (0, 32 // bits)
        return self._part("weight_zero_point", tuple(dims))


def _blocks(scheme: Mapping[str, Any], shape: tuple[int, ...]) -> list[list[int]]:
    """Return the sizes of the blocks of a scheme, for both dims of a weight."""
    strategy, group = scheme.get("strategy"), scheme.get("group_size")
    if strategy == "block":
        return [list(scheme.get("block_structure") or ())] if scheme.get("block_structure") else []
    if strategy in ("group", "tensor_group"):
        return [[1, group]] if group else []
    return [[1, shape[1]]] if strategy == "channel" else [list(shape)]


def _decoder(parts: Mapping[str, Part], bits: int) -> Any:
    packed = parts["values"].dims[1]

    def decode(chunk: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        if bits:
            values = packed_integers(chunk["values"], bits)[:, : shape[1]] - 2 ** (bits - 1)
        elif packed == (1, 2):
            values = fp4_values(chunk["values"])
        else:
            values = chunk["values"]
        scale = scale_values(chunk["scale"])
        if "global" in chunk:
            scale = scale / chunk["global"].float()
        values = values.float()
        if "zero" in chunk:
            zero = chunk["zero"]
            if parts["zero"].dims != parts["scale"].dims:
                zero = (packed_integers(zero.T, bits).T - 2 ** (bits - 1))[: shape[0]]
            values = values - spread(zero.float(), parts["scale"], shape)
        return values * spread(scale, parts["scale"], shape)

    return decode

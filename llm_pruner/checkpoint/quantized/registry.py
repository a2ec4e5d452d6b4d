"""Open the files of a checkpoint, quantized or not; refuse the formats that are not read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import PrunerError, in_one_line
from ...files import read_json
from ..shards import INDEX, SINGLE, Shards
from .awq import awq_weights
from .compressed import compressed_weights
from .fp8 import FLOATS, fp8_weights
from .gptq import gptq_weights
from .mxfp4 import mxfp4_weights
from .weights import Part, Weight, dequantize

# The formats that are read, by the ``quant_method`` of their configs.
FORMATS: dict[str, Callable[[Shards, Mapping[str, Any]], Iterator[Weight]]] = {
    "fp8": fp8_weights,
    "mxfp4": mxfp4_weights,
    "compressed-tensors": compressed_weights,
    "gptq": gptq_weights,
    "awq": awq_weights,
}
QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
# Scales and packed weights of float8, GPTQ, AWQ, compressed-tensors and bitsandbytes.
QUANTIZATION_TENSORS = re.compile(
    r"\.((weight|input|output|k|v)_scale(_inv|_2)?|qweight|qzeros|g_idx|weight_packed|SCB|absmax|quant_map)$"
)
# Numbers that stay as they are where nothing is cut: scales of keys and values in the cache.
OF_CACHE = re.compile(r"\.[qkv]_(scale|zero_point)$")


class QuantizedShards(Shards):
    """The tensors of a quantized checkpoint, and the weights that they stand for.

    Attributes:
        method: name of the format.
        quantization: ``quantization_config`` of the config, as it is stored.
        weights: quantized weights, by the names that they have in an unquantized checkpoint.

    Raises:
        PrunerError: as :class:`Shards`, and where a scale is missing or has another shape.
    """

    def __init__(self, folder: str | Path, quantization: dict[str, Any]):
        super().__init__(folder)
        self.quantization = quantization
        self.method = str(quantization.get("quant_method"))
        self.weights = self._read_weights()
        self.parts: dict[str, tuple[Weight, Part]] = {
            part.name: (weight, part) for weight in self.weights.values() for part in weight.tensors
        }
        for name, place in self.tensors.items():
            if name in self.parts or OF_CACHE.search(name):
                continue
            if place.dtype in FLOATS or QUANTIZATION_TENSORS.search(name):
                raise PrunerError(
                    f"{name} in {place.file} is {str(place.dtype).removeprefix('torch.')} and has no scale that "
                    f"{self.method} describes: the checkpoint is incomplete"
                )

    def _read_weights(self) -> dict[str, Weight]:
        """Return the quantized weights by name.

        Raises:
            PrunerError: as the class; or a field of the config has another type or value than the format allows.
        """
        try:
            return {weight.name: weight for weight in FORMATS[self.method](self, self.quantization)}
        except PrunerError:
            raise
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> PrunerError:
        return PrunerError(
            f"{self.folder}: the quantization_config is damaged, or other tensors are stored than it describes: "
            f"{in_one_line(error)}"
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that an unquantized checkpoint would hold, by name."""
        plain = {name: shape for name, shape in super().shapes().items() if name not in self.parts}
        plain = {name: shape for name, shape in plain.items() if not OF_CACHE.search(name)}
        return plain | {name: weight.shape for name, weight in self.weights.items()}

    def values(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Read a tensor that an unquantized checkpoint would hold; a quantized weight is dequantized to ``dtype``."""
        if name not in self.weights:
            return self.read(name)
        try:
            return dequantize(self.weights[name], self.read, dtype)
        except (TypeError, ValueError, LookupError, RuntimeError) as error:
            if isinstance(error, PrunerError) or "memory" in str(error):
                raise
            raise self._damaged(error) from error


def quantization_of(folder: str | Path) -> dict[str, Any] | None:
    """Return the ``quantization_config`` of a folder's config, None for a config without and for no folder.

    Raises:
        PrunerError: the config cannot be read.
    """
    file = Path(folder) / "config.json"
    config = read_json(file) if file.is_file() else None
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return found if isinstance(found, dict) else None


def open_shards(name: str, folder: Path) -> Shards | None:
    """Open the files of a model, with their headers read; refuse quantized weights in formats that are not read.

    Args:
        name: name of the model, for the message.
        folder: folder of the model.

    Returns:
        The shards of the folder; None if it holds no safetensors files.

    Raises:
        PrunerError: the config, a file or a tensor tells of a format that is not read, or a shard is damaged.
    """
    quantization = quantization_of(folder)
    stored = any((folder / file).is_file() for file in (SINGLE, INDEX))
    if quantization is not None:
        check_method(name, quantization)
        return QuantizedShards(folder, quantization) if stored else None
    signs = [file for file in QUANTIZATION_FILES if (folder / file).is_file()]
    if not signs and not stored:
        return None
    if not signs:
        shards = Shards(folder)
        tensors = shards.tensors.items()
        signs = [n for n, place in tensors if QUANTIZATION_TENSORS.search(n) or place.dtype in FLOATS]
        if not signs:
            return shards
    raise PrunerError(
        f"{name} is quantized ({signs[0]}) and its config has no quantization_config, which says how: load the "
        "unquantized checkpoint"
    )


def check_method(name: str, quantization: Mapping[str, Any]) -> None:
    """Refuse a quantized model whose format is not read.

    Raises:
        PrunerError: as above; the message names the format.
    """
    method = str(quantization.get("quant_method"))
    if method not in FORMATS:
        raise PrunerError(
            f"{name} is quantized (quantization_config: {method}), and {', '.join(FORMATS)} are read: dequantize it "
            "to 16 bits with the tool that quantized it, or load the unquantized checkpoint"
        )

"""Find tensors that the files of a checkpoint hold and its model does not read, and refuse quantized weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import PrunerError
from ..logs import log
from .shards import INDEX, SINGLE, Shards

QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
# Scales and packed weights of float8, GPTQ, AWQ, compressed-tensors and bitsandbytes.
QUANTIZATION_TENSORS = re.compile(
    r"\.((weight|input|output|k|v)_scale(_inv|_2)?|qweight|qzeros|g_idx|weight_packed|SCB|absmax|quant_map)$"
)
NARROW_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
UNREAD = "unread_tensors"  # where plans and metrics list them
COMPUTED = re.compile(r"(inv_freq|masked_bias|position_ids|attn\.bias|attention\.bias)$")  # buffers made anew
PREDICTED_LAYERS = re.compile("nextn|mtp")  # fields that count layers for multi-token prediction
_unread: WeakKeyDictionary[PreTrainedModel, list[str]] = WeakKeyDictionary()


def check_unquantized(name: str, folder: Path, config: PreTrainedConfig) -> Shards | None:
    """Refuse a checkpoint of quantized weights, since cutting weights would not cut their scales.

    Args:
        name: name of the model, for the message.
        folder: folder of the model; if it holds no safetensors files, only the config is checked.

    Returns:
        The shards of the folder, with their headers read; None if the folder holds no safetensors files.

    Raises:
        PrunerError: the config, a file or a tensor tells of quantization, or a shard is damaged.
    """
    signs = ["quantization_config"] if getattr(config, "quantization_config", None) is not None else []
    signs += [file for file in QUANTIZATION_FILES if (folder / file).is_file()]
    shards = None
    if not signs and any((folder / file).is_file() for file in (SINGLE, INDEX)):
        shards = Shards(folder)
        tensors = shards.tensors.items()
        signs += [n for n, tensor in tensors if QUANTIZATION_TENSORS.search(n) or tensor.dtype in NARROW_FLOATS]
    if signs:
        raise PrunerError(
            f"{name} is quantized ({signs[0]}); structural pruning needs the original weights: load the unquantized "
            "checkpoint"
        )
    return shards


def note_unread(model: PreTrainedModel, name: str, tensors: Iterable[str], unexpected: Iterable[str]) -> None:
    """Log and record the tensors that a model did not read, and set the config's counts of their layers to 0.

    Args:
        tensors: names of all stored tensors, to find those that the model's class ignores.
        unexpected: names that transformers reports.
    """
    names = set(unexpected)
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    held = model.state_dict().keys()
    names |= {one for one in tensors if one not in held and any(re.search(pattern, one) for pattern in ignored)}
    _unread[model] = forget_unread(model.config, name, names)


def forget_unread(config: PreTrainedConfig, name: str, unread: Iterable[str]) -> list[str]:
    """Log the tensors that are left out of what is written, and set the numbers of their layers in the config to 0.

    Returns:
        Names of the tensors, without buffers that models compute.
    """
    names = sorted(one for one in unread if not COMPUTED.search(one))
    if not names:
        return []
    log.warning(
        "%s: %d tensors of its files are not read by %s and left out of all that is written: %s",
        name,
        len(names),
        " or ".join(config.architectures or ()) or type(config).__name__,
        ", ".join(names[:3]) + (", ..." if len(names) > 3 else ""),
    )
    for field, count in list(vars(config).items()):
        if PREDICTED_LAYERS.search(field) and isinstance(count, int) and count > 0:
            log.warning("%s: its layers for multi-token prediction are among them; %s is set to 0", name, field)
            setattr(config, field, 0)
    return names


def unread_tensors(model: PreTrainedModel) -> list[str]:
    """Return the tensors of a loaded model's files that it does not read."""
    return _unread.get(model, [])

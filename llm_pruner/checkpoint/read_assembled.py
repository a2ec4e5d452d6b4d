"""Read a checkpoint whose files hold a model's tensors in another form: quantized, or expert by expert."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..errors import PrunerError
from ..logs import log
from ..surgery.apply import Place, in_memory
from .config import meta_model
from .quantized.registry import QuantizedShards
from .shards import Shards
from .stored import assembled, dtype_of, model_of, stored_boxes


class _Lazy:
    """A tensor that is read, and dequantized, when transformers indexes it."""

    def __init__(self, shards: Shards, name: str, dtype: torch.dtype):
        self.shards, self.name, self.dtype = shards, name, dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.shards.values(self.name, self.dtype)[index]


def is_in_parts(name: str, config: PreTrainedConfig, shards: Shards, trust_remote_code: bool = False) -> bool:
    """Return True if some stored tensors are parts of a tensor of the model, such as single experts of a stack."""
    try:
        boxes = stored_boxes(model_of(name, config, shards, trust_remote_code=trust_remote_code), shards)
    except PrunerError:  # in another form, or incomplete, which transformers reads or refuses
        return False
    return not all(box.is_whole for box in boxes.values())


def read_assembled(
    name: str,
    config: PreTrainedConfig,
    shards: Shards,
    *,
    dtype: str | torch.dtype,
    place: Place = in_memory,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Read the weights of a folder one by one, dequantized if need be; return the model and the loader's report.

    Args:
        dtype: dtype of the weights; ``auto`` is that of the config.
        place: function that moves each weight to its final memory; if it is not memory, a model's tensors are filled
            there, stored tensor by stored tensor.
    """
    path = shards.folder
    chosen = dtype if isinstance(dtype, torch.dtype) else dtype_of(config)
    if isinstance(shards, QuantizedShards):
        config.__dict__.pop("quantization_config", None)
        log.info(
            "%s is quantized (%s): its weights are dequantized to %s",
            name,
            shards.method,
            str(chosen).removeprefix("torch."),
        )
    model = meta_model(config, trust_remote_code)
    state: dict[str, Any] = {stored: _Lazy(shards, stored, chosen) for stored in shards.shapes()}
    if place is not in_memory:
        state = dict(assembled(model, shards, chosen, place))
    loader: Any = type(model)
    model, report = loader.from_pretrained(
        None, config=config, state_dict=state, dtype=chosen, output_loading_info=True
    )
    model.config.name_or_path = model.name_or_path = str(path)
    if model.can_generate() and (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model, report

"""Read a quantized checkpoint as the unquantized one that it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..logs import log
from ..surgery.apply import Place, in_memory
from .config import meta_model
from .locate import locate
from .quantized.registry import QuantizedShards
from .stored import assembled, dtype_of


class _Lazy:
    """A tensor of an unquantized checkpoint that is read, and dequantized, when transformers indexes it."""

    def __init__(self, shards: QuantizedShards, name: str, dtype: torch.dtype):
        self.shards, self.name, self.dtype = shards, name, dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.shards.values(self.name, self.dtype)[index]


def read_quantized(
    name: str,
    config: PreTrainedConfig,
    shards: QuantizedShards,
    *,
    dtype: str | torch.dtype,
    place: Place = in_memory,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Dequantize the weights of a folder one by one, as transformers asks for them; return model and loader's report.

    Args:
        dtype: dtype of the weights; ``auto`` is that of the config.
        place: function that moves each weight to its final memory; if it is not memory, a model's tensors are filled
            there, stored tensor by stored tensor.
    """
    path = Path(locate(name)[0])
    config.__dict__.pop("quantization_config", None)
    chosen = dtype if isinstance(dtype, torch.dtype) else dtype_of(config)
    log.info("%s is quantized (%s): its weights are dequantized to %s", name, shards.method, str(chosen)[6:])
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

"""Build a model from a config and given tensors."""

from __future__ import annotations

import copy

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights


def build_from_state(
    config: PreTrainedConfig, state: dict[str, torch.Tensor], model: PreTrainedModel
) -> PreTrainedModel:
    """Build a model of the class of ``model`` from another config, on the tensors of ``state`` (not copied)."""
    # Weights are not allocated twice; tables that no checkpoint holds are computed.
    on_meta = model.device.type == "meta"
    with torch.device("meta") if on_meta else init_empty_weights(include_buffers=False), no_init_weights():
        built = type(model)._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    built.load_state_dict(state, strict=True, assign=True)
    built.tie_weights()
    if model.can_generate():
        built.generation_config = copy.deepcopy(model.generation_config)
    for path, module in built.named_modules():  # buffers that no checkpoint holds stay as constructed
        for key, buffer in module.named_buffers(recurse=False):
            setattr(module, key, buffer.to(_device_at(built, path)))
    return built.train(model.training)


def _device_at(model: PreTrainedModel, path: str) -> torch.device:
    """Return the device of a module's weights; of a module without, that of the module around it."""
    while (weight := next(model.get_submodule(path).parameters(), None)) is None:
        path = path.rpartition(".")[0]
    return weight.device

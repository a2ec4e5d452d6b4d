"""Build a model on the meta device and read its tensor names and shapes."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from .per_layer import recording_constructors
from .running import stored_tensors


def parameter_count(model: nn.Module) -> int:
    """Count the parameters of a model, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def names_of(model: PreTrainedModel) -> dict[str, list[str]]:
    """Return all names of each tensor by its first name: tied tensors have several."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        names.setdefault(first.setdefault(id(tensor), name), []).append(name)
    return names


def canonical_names(model: PreTrainedModel) -> dict[str, str]:
    """Return the first name of each tensor, under which plans know it, by each of its names."""
    return {alias: first for first, names in names_of(model).items() for alias in names}


Shapes = dict[str, tuple[int, ...]]


def shapes_of(module: nn.Module) -> Shapes:
    """Return the shapes of the tensors that a checkpoint of the module holds."""
    return {name: tuple(t.shape) for name, t in stored_tensors(module).items()}


def skeleton(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model on the meta device; every module remembers how it was constructed."""
    with recording_constructors(model_class), torch.device("meta"), no_init_weights():
        model = model_class(copy.deepcopy(config))
    model.tie_weights()
    return model

"""Room for a bias: some configs can give the projections of their layers one."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import PrunerError
from ..models.per_layer import fields_of, layer_lists, set_field
from ..models.running import check_calibration
from ..models.skeleton import skeleton
from ..surgery.rebuild import build_from_state
from .compensate import added_projections

Shapes = dict[str, tuple[int, ...]]


def with_biases(model: PreTrainedModel, calibration: torch.Tensor) -> PreTrainedModel:
    """The same model, on the same weights, with a bias of zero for projections that write to the stream of its layers.

    Switched on are the fields of the config that give such a projection a bias and change no other tensor. They may
    give other projections one too, which stays zero. A model that has these biases is returned as it is.

    Args:
        calibration: LongTensor ``[samples, tokens]``, to see which projections write to the stream.

    Raises:
        PrunerError: no projection has a bias, and no field of the config gives it one.
    """
    path = next(iter(layer_lists(model)), "")
    calibration = check_calibration(model, calibration)
    added = added_projections(model, calibration)
    wanted = {f"{path}.{i}.{name}.bias" for i, names in enumerate(added) for name in names}
    before = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if wanted <= before.keys():
        return model
    config = copy.deepcopy(model.config)
    shapes = _shapes(type(model), config)
    for name in [name for name, value in fields_of(config).items() if value is False]:
        switched = copy.deepcopy(config)
        set_field(switched, name, True)
        try:
            found = _shapes(type(model), switched)
        except Exception:  # a field may be anything, and a model may refuse it in any way it likes
            continue
        more = found.keys() - shapes.keys()
        kept = all(found.get(name) == shape for name, shape in shapes.items())
        if kept and more & wanted and all(name.endswith(".bias") for name in more):
            config, shapes = switched, found
    if not wanted & shapes.keys():
        raise PrunerError(
            f"no config of {type(model).__name__} gives its projections a bias: compensate by least_squares"
        )
    there = model.state_dict()
    missing = {
        name: torch.zeros(shape, dtype=model.dtype, device=model.device)
        for name, shape in shapes.items()
        if name not in there
    }
    return build_from_state(config, there | missing, model)


def _shapes(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Shapes:
    return {name: tuple(t.shape) for name, t in skeleton(model_class, config).state_dict().items()}

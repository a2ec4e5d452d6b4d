"""Add biases of zero to projections, where the config has a field for them."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import PrunerError
from ..models.constructors import fields_of
from ..models.inputs import Inputs
from ..models.per_layer import layer_lists, set_field
from ..models.running import check_calibration
from ..models.skeleton import skeleton
from ..surgery.rebuild import build_from_state
from .added import added_projections

Shapes = dict[str, tuple[int, ...]]


def with_biases(model: PreTrainedModel, calibration: Inputs) -> PreTrainedModel:
    """Return the model, on the same weights, with a bias of zero for projections that write to the residual stream.

    Every field of the config is switched on that gives such a projection a bias and changes no other tensor. The field
    may give other projections a bias too, which stays zero. A model that has these biases is returned itself.

    Args:
        calibration: LongTensor ``[samples, tokens]``, to find the projections that write to the stream.

    Raises:
        PrunerError: no projection has a bias, and no field of the config gives it one.
    """
    path = next(iter(layer_lists(model)), "")
    calibration = check_calibration(model, calibration)
    projections = added_projections(model, calibration)
    biases = {f"{path}.{i}.{one.name}.bias" for i, added in enumerate(projections) for one in added}
    state = model.state_dict()
    if biases <= state.keys():
        return model
    config, shapes = _with_bias_fields(model, biases)
    if not biases & shapes.keys():
        raise PrunerError(
            f"no config of {type(model).__name__} gives its projections a bias: compensate by least_squares"
        )
    zeros = {
        name: torch.zeros(shape, dtype=model.dtype, device=model.device)
        for name, shape in shapes.items()
        if name not in state
    }
    return build_from_state(config, state | zeros, model)


def _with_bias_fields(model: PreTrainedModel, biases: set[str]) -> tuple[PreTrainedConfig, Shapes]:
    """Return the config with every field on that adds some of ``biases`` and changes no tensor, and its shapes."""
    config = copy.deepcopy(model.config)
    shapes = _shapes(type(model), config)
    for name in [name for name, value in fields_of(config).items() if value is False]:
        switched = copy.deepcopy(config)
        set_field(switched, name, True)
        try:
            switched_shapes = _shapes(type(model), switched)
        except Exception:  # a field may be anything, and a model may refuse it in any way it likes
            continue
        more = switched_shapes.keys() - shapes.keys()
        unchanged = all(switched_shapes.get(name) == shape for name, shape in shapes.items())
        if unchanged and more & biases and all(name.endswith(".bias") for name in more):
            config, shapes = switched, switched_shapes
    return config, shapes


def _shapes(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Shapes:
    return {name: tuple(t.shape) for name, t in skeleton(model_class, config).state_dict().items()}

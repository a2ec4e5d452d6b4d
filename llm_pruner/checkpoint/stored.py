"""Match stored tensors with the tensors of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import PrunerError
from ..models.running import stored_tensors
from ..models.skeleton import canonical_names, names_of
from ..surgery.apply import Place, in_memory
from .boxes import Box, OtherForm, boxes_of, whole
from .config import load_config, meta_model, untie
from .locate import locate
from .quantized.registry import open_shards
from .shards import Shards


def weights_in(
    source: str, trust_remote_code: bool = False, *, task: str | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of a folder one by one, under the model's names.

    Args:
        task: read them as the class of this task instead of the declared class.

    Raises:
        PrunerError: as :class:`Shards` and :func:`stored_boxes`.
    """
    path = Path(locate(source)[0])
    shards = open_shards(source, path) or Shards(path)
    config = load_config(source, trust_remote_code, task=task)
    model = model_of(source, config, shards, trust_remote_code=trust_remote_code)
    canonical = canonical_names(model)
    for name, tensor in assembled(model, shards, dtype_of(config)):
        yield canonical[name], tensor


def assembled(
    model: PreTrainedModel, shards: Shards, dtype: torch.dtype, place: Place = in_memory
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a model one by one, each made of the stored tensors that lie in it.

    Args:
        dtype: dtype of weights that are stored quantized.
        place: function that moves a tensor to its final memory, where it is filled.

    Raises:
        PrunerError: as :func:`stored_boxes`.
    """
    by_parameter: dict[str, list[str]] = {}
    boxes, own = stored_boxes(model, shards), model.state_dict()
    for name, box in boxes.items():
        by_parameter.setdefault(box.parameter, []).append(name)
    for parameter, names in by_parameter.items():
        first = boxes[names[0]]
        if len(names) == 1 and first.is_whole:
            yield parameter, place(shards.values(names[0], dtype))
            continue
        tensor = None
        for name in names:
            values = shards.values(name, dtype)
            if tensor is None:
                tensor = place(values.new_zeros(()).expand(own[parameter].shape))
                tensor = tensor.clone() if not tensor.is_contiguous() else tensor
            boxes[name].fill(tensor, values)
        assert tensor is not None
        yield parameter, tensor


def dtype_of(config: PreTrainedConfig) -> torch.dtype:
    """Return the dtype of a config's weights, or bfloat16 if it names none or one that nothing is computed in."""
    dtype = config.dtype
    return dtype if dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.bfloat16


def stored_boxes(model: PreTrainedModel, shards: Shards) -> dict[str, Box]:
    """Return the place in the model of every stored tensor; tensors that the model does not know are left out.

    Raises:
        PrunerError: the checkpoint lacks tensors of the model, or (``OtherForm``) holds them in another form.
    """
    shapes = shards.shapes()
    own, prefix = model.state_dict(), model.base_model_prefix
    boxes = {}
    for stored, shape in shapes.items():
        for name in (stored, f"{prefix}.{stored}", stored.removeprefix(f"{prefix}.")):
            if name in own:
                boxes[stored] = Box(parameter=name, shape=shape, dims=whole(shape))
                break
    if _missing(model, boxes):
        rest = {name: shape for name, shape in shapes.items() if name not in boxes}
        boxes |= boxes_of(model, rest)
    if missing := _missing(model, boxes):
        strange = [name for name in shapes if name not in boxes]
        if strange:
            raise OtherForm(f"{shards.folder} stores {strange[0]} and not {missing}, as {type(model).__name__} has it")
        raise PrunerError(f"{shards.folder} lacks {missing} of {type(model).__name__}: the checkpoint is incomplete")
    return boxes


def _missing(model: PreTrainedModel, boxes: Mapping[str, Box]) -> str | None:
    """Return a tensor of the model that no stored tensor lies in."""
    own, tied = model.state_dict(), names_of(model)
    matched = {box.parameter for box in boxes.values()}
    missing = (name for name in stored_tensors(model) if name in own and not matched & set(tied[name]))
    return next(missing, None)


def model_of(
    source: str, config: PreTrainedConfig, shards: Shards, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build the model that a checkpoint's files hold, on the meta device.

    The config is told if it ties tensors that the files hold apart, as transformers reads them.
    """
    model = meta_model(config, trust_remote_code)
    if _holds_untied(model, shards):
        untie(config, source)
        model = meta_model(config, trust_remote_code)
    return model


def _holds_untied(model: PreTrainedModel, shards: Shards) -> bool:
    """Return True if a checkpoint stores a tensor that its config ties to another, with other values."""
    own = model.state_dict()
    for names in names_of(model).values():
        stored = [name for name in names if name in own and name in shards.tensors]
        if len(stored) > 1 and not all(torch.equal(shards.read(stored[0]), shards.read(one)) for one in stored[1:]):
            return True
    return False

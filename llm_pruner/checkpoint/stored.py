"""Match stored tensors with the tensors of a model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import PrunerError
from ..models.running import stored_tensors
from ..models.skeleton import canonical_names, names_of
from .config import load_config, meta_model, untie
from .locate import locate
from .shards import Shards


class OtherForm(PrunerError):
    """A checkpoint holds its tensors in another form than the model, such as every expert by itself."""


def weights_in(
    source: str, trust_remote_code: bool = False, *, task: str | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of a folder one by one, under the model's names.

    Args:
        task: read them as the class of this task instead of the declared class.

    Raises:
        PrunerError: as :class:`Shards`, and where the files hold the weights in another form.
    """
    shards = Shards(locate(source)[0])
    config = load_config(source, trust_remote_code, task=task)
    model = model_of(source, config, shards, trust_remote_code=trust_remote_code)
    canonical = canonical_names(model)
    for stored, name in stored_names(model, shards).items():
        yield canonical[name], shards.read(stored)


def stored_names(model: PreTrainedModel, shards: Shards) -> dict[str, str]:
    """Return the model's name of every stored tensor; tensors that the model does not know are left out.

    Raises:
        PrunerError: the checkpoint lacks tensors of the model, or (``OtherForm``) holds them in another form.
    """
    own = model.state_dict()
    prefix = model.base_model_prefix
    names = {}
    for stored in shards.tensors:
        for name in (stored, f"{prefix}.{stored}", stored.removeprefix(f"{prefix}.")):
            if name in own:
                names[stored] = name
                break
    tied = names_of(model)
    matched = set(names.values())
    missing = [name for name in stored_tensors(model) if name in own and not matched & set(tied[name])]
    if missing:
        strange = [name for name in shards.tensors if name not in names]
        if strange:
            raise OtherForm(
                f"{shards.folder} stores {strange[0]} and not {missing[0]}, as {type(model).__name__} has it"
            )
        raise PrunerError(f"{shards.folder} lacks {missing[0]} of {type(model).__name__}: the checkpoint is incomplete")
    return names


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

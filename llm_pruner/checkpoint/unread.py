"""Find tensors that the files of a checkpoint hold and its model does not read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from weakref import WeakKeyDictionary

from transformers import PreTrainedConfig, PreTrainedModel

from ..logs import log
from ..models.per_layer import parts_of

UNREAD = "unread_tensors"  # where plans and metrics list them
COMPUTED = re.compile(r"(inv_freq|masked_bias|position_ids|attn\.bias|attention\.bias)$")  # buffers made anew
PREDICTED_LAYERS = re.compile("nextn|mtp")  # fields that count layers for multi-token prediction
_unread: WeakKeyDictionary[PreTrainedModel, list[str]] = WeakKeyDictionary()


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
    for part in parts_of(config):
        for field, count in list(vars(part).items()):
            if PREDICTED_LAYERS.search(field) and isinstance(count, int) and count > 0:
                log.warning("%s: its layers for multi-token prediction are among them; %s is set to 0", name, field)
                setattr(part, field, 0)
    return names


def unread_tensors(model: PreTrainedModel) -> list[str]:
    """Return the tensors of a loaded model's files that it does not read."""
    return _unread.get(model, [])

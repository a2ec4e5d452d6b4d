"""Refits of one layer after the other: what is kept of them, and how they go on from it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from ..unfinished import Kept, Unfinished
from .stream import ResidualStream

STREAM = "stream."  # prefix of the hidden states of a batch; no parameter begins so


def keep_layers(
    unfinished: Unfinished, pruned: PreTrainedModel, modules: Iterable[str], *, stream: ResidualStream, record: Any
) -> None:
    """Keep the parameters of refitted modules and the stream behind the last refitted layer, if it is time."""
    if not unfinished.due:
        return
    tensors = {
        f"{path}.{name}": parameter
        for path in modules
        for name, parameter in pruned.get_submodule(path).named_parameters()
    }
    unfinished.write(tensors | {f"{STREAM}{i}": hidden for i, hidden in enumerate(stream.hidden)}, record)


def restore_layers(kept: Kept, pruned: PreTrainedModel, path: str, stream: ResidualStream | None = None) -> None:
    """Put the kept parameters of a stack into the model; move its stream behind the last refitted layer."""
    for name, parameter in pruned.named_parameters():
        if name in kept.tensors and name.startswith(f"{path}."):
            parameter.data.copy_(kept.tensors[name])
    if stream is not None:
        stream.hidden = [stream.put(kept.tensors[f"{STREAM}{i}"].to(hidden)) for i, hidden in enumerate(stream.hidden)]

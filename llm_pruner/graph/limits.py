"""Find units that must not be pruned, or only to a multiple, for reasons that no operator tells."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from math import lcm
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..models.constructors import refusal
from ..models.per_layer import parts_of
from .places import common_path


class Judged(Protocol):
    """Interface of :class:`llm_pruner.graph.units.Unit` to this module."""

    kind: str
    multiple: int
    layer: int | None
    frozen: str | None
    idle: bool
    dims: dict[tuple[str, int], torch.Tensor]

    @property
    def parameters(self) -> list[str]: ...


def judge_by_twins(model: nn.Module, units: Sequence[Judged], idle: set[str]) -> None:
    """Treat units in modules that are built like others as these are, as one field of the config is the width of both.

    Units outside of layers get the kind and the multiple of their twins in layers. Units that the output does not
    depend on are frozen unless they have a twin that can be pruned: a branch that short inputs leave out may matter to
    longer ones, so that nothing else is known of it.

    Args:
        idle: parameters that the output does not depend on.
    """
    free = [unit for unit in units if unit.frozen is None]
    for unit in free:
        unit.idle = idle.issuperset(unit.parameters)
    asked = [unit for unit in free if unit.kind != "layers" and (unit.idle or unit.layer is None)]
    classes = {_class_around(model, unit) for unit in asked}
    known = [unit for unit in free if unit.layer is not None and not unit.idle]
    twins = {_form(model, unit): unit for unit in known if _class_around(model, unit) in classes}
    for unit in asked:
        twin = twins.get(_form(model, unit), unit)
        unit.kind, unit.multiple = twin.kind, twin.multiple
    for unit in free:
        if unit.idle and _form(model, unit) not in twins:
            unit.frozen = "the output does not depend on it"


def _class_around(model: nn.Module, unit: Judged) -> type[nn.Module]:
    """Return the class of the smallest module that holds all of a unit."""
    return type(model.get_submodule(common_path(unit.parameters)))


def _form(model: nn.Module, unit: Judged) -> Hashable:
    """Return what units of the same parameters in modules of one class share."""
    path = common_path(unit.parameters)
    dims = ((name.removeprefix(path), dim, label.numpy().tobytes()) for (name, dim), label in unit.dims.items())
    return _class_around(model, unit), frozenset(dims)


def hidden_multiple(model: nn.Module, size: int) -> int:
    """Return the number that the hidden size must be a multiple of: many configs refuse a size that their attention
    heads do not divide, even where heads have a size of their own."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return 1
    return lcm(*(_multiple(config, part, size) for part in range(len(parts_of(config)))))


def _multiple(config: PreTrainedConfig, part: int, size: int) -> int:
    """Return what one part of a config demands of its hidden size, 1 if that is another size or anything will do."""
    config = copy.deepcopy(config)
    inner: Any = parts_of(config)[part]
    if refusal(config):
        return 1
    try:
        heads = inner.num_attention_heads
        if inner.hidden_size != size or size % heads:
            return 1
        inner.hidden_size = size - 1
    except Exception:  # no such field, or heads that differ by layer, say nothing
        return 1
    return heads if refusal(config) else 1

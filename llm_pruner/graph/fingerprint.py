"""A model's structure as a value: equal fingerprints mean equal graphs."""

from __future__ import annotations

import types
import weakref
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import nn

from ..models.running import stored_tensors

_OF_TORCH = vars(nn.Module()).keys()  # what every module has; its tensors, modules and hooks are looked at below
# Attributes and fields on which no axis depends: modes, precision, records of transformers and of the package.
_IRRELEVANT = {"training", "dtype", "generation_config", "name_or_path", "_name_or_path", "architectures"}
_IRRELEVANT |= {"transformers_version", "_is_hf_initialized", "_constructed_with"}


class Identity:
    """An object that is equal to itself only, held weakly; a dead one equals nothing else."""

    def __init__(self, value: Any):
        self.reference = weakref.ref(value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Identity):
            return NotImplemented
        return self is other or (self.reference() is not None and self.reference() is other.reference())

    def __hash__(self) -> int:
        return 0


def fingerprint(model: nn.Module) -> Hashable:
    """Describe all of a model that its graph depends on, without its weights.

    These are the type, attributes, hooks and place of every module, configs, the name, shape and ties of every tensor,
    and the axes along which a constant is the same everywhere.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> before = fingerprint(model)
    >>> model[1] = nn.Tanh()
    >>> fingerprint(model) == before
    False
    """
    return _Description(model).whole()


class _Description:
    def __init__(self, model: nn.Module):
        self.model = model
        self.configs: dict[int, Hashable] = {}  # one config is shared by most modules, and slow to describe
        self.places: dict[int, str] = {}  # of modules and tensors: their first path
        self.modules = list(model.named_modules(remove_duplicate=False))
        for path, module in self.modules:
            self.places.setdefault(id(module), path)

    def whole(self) -> Hashable:
        stored = {id(tensor) for tensor in stored_tensors(self.model).values()}  # tied tensors have several names
        modules = tuple(self.module(path, module) for path, module in self.modules)
        tensors = [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]
        return modules, tuple(self.tensor(name, tensor, id(tensor) in stored) for name, tensor in tensors)

    def module(self, path: str, module: nn.Module) -> Hashable:
        if self.places[id(module)] != path:
            return path, self.places[id(module)]
        attributes = vars(module)
        own = {name: value for name, value in attributes.items() if name not in _OF_TORCH}
        hooks = [*attributes["_forward_pre_hooks"].values(), *attributes["_forward_hooks"].values()]
        return path, type(module), type(module).forward, self.value(own), self.value(hooks)

    def tensor(self, name: str, tensor: torch.Tensor, stored: bool) -> Hashable:
        first = self.places.setdefault(id(tensor), name)
        return name, first, tuple(tensor.shape), None if stored else uniform_axes(tensor)

    def value(self, value: Any) -> Hashable:
        """Describe an attribute: plain values by value, functions and unknown objects by identity."""
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type)):
            return type(value), value
        if isinstance(value, nn.Module):
            return nn.Module, self.places.get(id(value), type(value))
        if isinstance(value, torch.Tensor):
            return torch.Tensor, tuple(value.shape), value.dtype
        if isinstance(value, dict):
            return dict, tuple((str(key), self.value(item)) for key, item in value.items() if key not in _IRRELEVANT)
        if isinstance(value, (list, tuple, set, frozenset)):
            return type(value), self.values(value)
        if isinstance(value, types.MethodType):
            return types.MethodType, self.value(value.__self__), Identity(value.__func__)
        if hasattr(value, "to_dict"):
            if id(value) not in self.configs:
                self.configs[id(value)] = self.value(value.to_dict())
            return type(value), self.configs[id(value)]
        try:
            return Identity(value)
        except TypeError:  # no weak references to it
            return type(value), repr(value)

    def values(self, values: Iterable[Any]) -> Hashable:
        described = [self.value(item) for item in values]
        return tuple(described if not isinstance(values, (set, frozenset)) else sorted(described, key=repr))


def uniform_axes(tensor: torch.Tensor) -> tuple[bool, ...]:
    """Return of each axis of a tensor whether all its indices hold the same; on the meta device none is known to.

    >>> uniform_axes(torch.tensor([[1, 2], [1, 2]]))
    (True, False)
    """
    if tensor.device.type == "meta" or not tensor.numel():
        return (False,) * tensor.ndim
    return tuple(bool((tensor == tensor.narrow(axis, 0, 1)).all()) for axis in range(tensor.ndim))

"""Models whose layers differ: the modelling half of transformers' ``per_layer_config``.

transformers 5 can write and read a config whose layers have their own values, but does not build a model
from it yet. This module does, for any architecture, with one idea: every layer can be built by its own
constructor from its own config. When a model with such a config has been built, each layer that differs is
built again and put in place of the first one, before any weight is loaded.

Some blocks cannot be written down even so. GPT-2 derives the width of its attention from the hidden size, so
no config has fewer heads; BART has two stacks of layers and one config. For those the config carries
``submodule_overrides``::

    {"h.3.attn": {"values": {"n_embd": 512, "n_head": 8}, "shapes": {"c_attn.weight": [768, 1536], ...}}}

that is, build that one block as if the model were narrower (which sets its head count, split sizes and scales
right), then give its leaves that face the hidden size the shapes stated. ``attributes``, if any, are set on the block
as it is: factors that must not change with the hidden size. A block with ``absent`` is gone: it adds nothing to the
stream, and returns so many values (0: no tuple). Paths begin at the smallest model inside
the model that holds every stack of layers built from this config.

And some heads carry a constant that the model computes for all of them, ALiBi's slopes. It goes on doing so, and
each layer takes its heads' part of what it is given, as ``constant_slices`` says::

    {"h.3": [{"argument": "alibi", "dim": 0, "size": 16, "inner": 1, "kept": [0, 2, ...]}]}

Importing :mod:`llm_pruner` installs this in transformers, so ``AutoModelForCausalLM.from_pretrained`` works. This file
knows nothing of the rest of the package: a checkpoint may carry a copy of it, to be read where there is no llm_pruner.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

SUBMODULES = "submodule_overrides"
CONSTANTS = "constant_slices"
Overrides = dict[str, Any]


def install() -> None:
    """Teach transformers to build models from per-layer configs; does nothing the second time."""
    if getattr(PreTrainedModel, "_llm_pruner_installed", False):
        return
    init, post_init = PreTrainedModel.__init__, PreTrainedModel.post_init

    @functools.wraps(init)
    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        if has_per_layer_widths(config):
            record_constructors(type(self))
        init(self, config, *args, **kwargs)

    @functools.wraps(post_init)
    def with_layers(self: PreTrainedModel) -> None:
        if has_per_layer_widths(self.config):
            _rebuild_layers(self)
        post_init(self)

    PreTrainedModel.__init__ = __init__  # type: ignore[method-assign]
    PreTrainedModel.post_init = with_layers  # type: ignore[method-assign]
    for name in ("set_attn_implementation", "set_experts_implementation"):
        setattr(PreTrainedModel, name, _reaching_layers(getattr(PreTrainedModel, name)))
    PreTrainedModel._llm_pruner_installed = True  # type: ignore[attr-defined]


def overrides_of(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """The blocks that a config wants built otherwise, by path."""
    return getattr(config, SUBMODULES, None) or {}


def has_per_layer_widths(config: PreTrainedConfig) -> bool:
    return bool(getattr(config, "is_heterogeneous", False) or overrides_of(config) or getattr(config, CONSTANTS, None))


def _reaching_layers(setter: Callable[..., None]) -> Callable[..., None]:
    """Layers that differ hold configs of their own, which a change of implementation must reach too."""

    @functools.wraps(setter)
    def change(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        setter(self, *args, **kwargs)
        for owner in (m for m in self.modules() if isinstance(m, PreTrainedModel) and has_per_layer_widths(m.config)):
            for module in owner.modules():
                config = getattr(module, "config", None)
                if isinstance(config, type(owner.config)) and config is not owner.config:
                    for slot in ("_attn_implementation_internal", "_experts_implementation_internal"):
                        config.__dict__[slot] = owner.config.__dict__.get(slot)

    return change


def record_constructors(model_class: type) -> None:
    """Make the modules of a modelling file remember what they were constructed with.

    A module's constructor is the only thing that knows how to make it right; its arguments are needed to ask
    it again with another config.
    """
    files = dict.fromkeys(base.__module__ for base in model_class.__mro__ if issubclass(base, PreTrainedModel))
    for module_class in [value for file in files for value in vars(sys.modules[file]).values()]:
        if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
            continue
        original = module_class.__dict__.get("__init__")
        if original is None or hasattr(original, "_records") or issubclass(module_class, PreTrainedModel):
            continue
        module_class.__init__ = _recording(original)  # type: ignore[method-assign,misc]


def _recording(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.__dict__["_constructed_with"] = (type(self), args, kwargs)

    __init__._records = True  # type: ignore[attr-defined]
    return __init__


def constructor_arguments(module: nn.Module) -> dict[str, Any] | None:
    """What a module was constructed with, by parameter name; None where that was not recorded."""
    if "_constructed_with" not in module.__dict__:
        return None
    module_class, args, kwargs = module.__dict__["_constructed_with"]
    return dict(list(_bound(module_class, args, kwargs).arguments.items())[1:])


def _bound(module_class: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    return inspect.signature(module_class.__init__).bind(None, *args, **kwargs)


def config_of(module: nn.Module) -> PreTrainedConfig | None:
    """The config that a module was constructed from, if any."""
    values = (constructor_arguments(module) or {}).values()
    return next((v for v in values if isinstance(v, PreTrainedConfig)), None)


def numbers_of(module: nn.Module) -> dict[str, int]:
    """The sizes that a module was constructed from beside its config: BART's attention is given ``num_heads``."""
    arguments = constructor_arguments(module) or {}
    return {
        name: value
        for name, value in arguments.items()
        if isinstance(value, int) and not isinstance(value, bool) and not re.search("idx|index|layer", name)
    }


def rebuild(module: nn.Module, overrides: Overrides | PreTrainedConfig) -> nn.Module:
    """The module as its constructor makes it from another config, or from the same one with other values.

    A value that is also an argument of the constructor itself (some blocks are given ``num_heads``) is passed as
    that. Raises whatever the constructor raises for values that make no sense, and ValueError for a module whose
    constructor was not recorded.
    """
    if "_constructed_with" not in module.__dict__:
        raise ValueError(f"{type(module).__name__} cannot be built again: it is not of a modelling file")
    module_class, args, kwargs = module.__dict__["_constructed_with"]
    bound = _bound(module_class, args, kwargs)
    for name, value in list(bound.arguments.items())[1:]:
        if isinstance(overrides, PreTrainedConfig):
            if isinstance(value, PreTrainedConfig):
                bound.arguments[name] = overrides
        elif isinstance(value, PreTrainedConfig):
            bound.arguments[name] = with_values(global_config(value), overrides)
        elif name in overrides:
            bound.arguments[name] = overrides[name]
    return module_class(*bound.args[1:], **bound.kwargs)


def with_values(config: PreTrainedConfig, values: Overrides) -> PreTrainedConfig:
    """A copy of a config with some fields changed and nothing derived anew."""
    out = copy.copy(config)
    for name, value in values.items():
        set_field(out, name, value)
    return out


def fields_of(config: PreTrainedConfig | None) -> dict[str, Any]:
    """The fields of a config, and those of the configs inside it as ``ffn_config.ffn_hidden_size``."""
    out: dict[str, Any] = {}
    for name, value in (vars(config) if config else {}).items():
        if isinstance(value, PreTrainedConfig):
            out |= {f"{name}.{inner}": v for inner, v in fields_of(value).items()}
        elif not name.startswith("_"):
            out[name] = value
    return out


def set_field(config: PreTrainedConfig, name: str, value: Any) -> None:
    """Change a field by its name from :func:`fields_of`; a config inside is copied first."""
    outer, _, inner = name.partition(".")
    if inner:
        part = copy.copy(getattr(config, outer))
        set_field(part, inner, value)
        setattr(config, outer, part)
    else:
        setattr(config, name, value)


def global_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy without per-layer values."""
    out = copy.copy(config)
    out.__dict__.pop("_heterogeneity_spec", None)
    return out


def layer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The stacks of decoder (or encoder) layers: outermost module lists of the model, by path.

    A list with a member that holds no parameters is no stack.
    """
    out: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        nested = any(path.startswith(f"{outer}.") for outer in out)
        if isinstance(module, nn.ModuleList) and len(module) and not nested:
            if any(next(member.parameters(), None) is None for member in module):
                continue
            out[path] = module
    return out


def stack_of(model: nn.Module, layers: int) -> nn.ModuleList | None:
    """The model's own list of decoder layers (not that of a model inside it that has its own config)."""
    for path, stack in layer_lists(model).items():
        parents = [model.get_submodule(p) for p in _ancestors(path)]
        if len(stack) == layers and not any(isinstance(p, PreTrainedModel) and p is not model for p in parents):
            return stack
    return None


def _ancestors(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _rebuild_layers(model: PreTrainedModel) -> None:
    config = model.config
    if getattr(config, "is_heterogeneous", False):
        stack = stack_of(model, config.num_hidden_layers) or nn.ModuleList()
        for i in range(len(stack)):
            if config._heterogeneity_spec.per_layer_overrides.get(i):
                stack[i] = rebuild(stack[i], config.per_layer_config[i])
    overrides = overrides_of(config)
    for path in sorted(overrides, key=lambda path: path.count(".")):  # a layer before the blocks in it
        try:
            block = model.get_submodule(path)
        except AttributeError:  # the path begins at another model, around this one or inside it
            continue
        recipe = overrides[path]
        if "absent" in recipe:
            model.set_submodule(path, Absent(recipe["absent"]))
            continue
        if recipe["values"] or recipe["shapes"]:
            block = rebuild(block, recipe["values"])
            for name, shape in recipe["shapes"].items():
                _resize(block, name, tuple(shape))
            model.set_submodule(path, block)
        for name, value in recipe.get("attributes", {}).items():
            if hasattr(block, name):
                setattr(block, name, value)
    for path, entries in (getattr(config, CONSTANTS, None) or {}).items():
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            continue
        for entry in entries:  # in the order in which they were cut
            constant = Constant(path, entry["argument"], entry["dim"], entry["size"], entry["inner"])
            layer.register_forward_pre_hook(hook_selecting([(constant, entry["kept"])]), with_kwargs=True)


class Absent(nn.Module):
    """A block that is gone: it adds nothing to the stream, and returns so many values (0: no tuple)."""

    def __init__(self, outputs: int):
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        nothing = torch.zeros_like(args[0] if args else kwargs["hidden_states"])
        return (nothing, *[None] * (self.outputs - 1)) if self.outputs else nothing


def _resize(block: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    """Give a leaf's parameter another shape, and the leaf the attributes that say so."""
    path, _, attribute = name.rpartition(".")
    leaf = block.get_submodule(path)
    old = getattr(leaf, attribute)
    if tuple(old.shape) == shape:
        return
    if isinstance(leaf, nn.Linear) and attribute == "weight":
        leaf.out_features, leaf.in_features = shape
    elif isinstance(leaf, Conv1D) and attribute == "weight":
        leaf.nx, leaf.nf = shape
    elif isinstance(leaf, nn.LayerNorm):
        leaf.normalized_shape = shape
    elif not isinstance(leaf, (nn.Linear, Conv1D)) and hasattr(leaf, "forward") and len(shape) != 1:
        raise ValueError(f"{type(leaf).__name__}.{attribute} cannot be given the shape {list(shape)}")
    new = torch.empty(shape, dtype=old.dtype, device=old.device)
    setattr(leaf, attribute, nn.Parameter(new, requires_grad=old.requires_grad))


@dataclass(frozen=True)
class Constant:
    """Dim ``dim`` of tensor argument ``argument`` of a layer, seen as ``[..., size, inner]``."""

    layer: str
    argument: str
    dim: int
    size: int
    inner: int

    def select(self, tensor: torch.Tensor, kept: Iterable[int]) -> torch.Tensor:
        """The tensor with only the ``kept`` indices of the axis, in that order."""
        index = torch.tensor(list(kept), device=tensor.device)
        parts = tensor.unflatten(self.dim, (-1, self.size, self.inner))
        return parts.index_select(self.dim + 1, index).flatten(self.dim, self.dim + 2)


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """The arguments of a call of a module by name (the class's own ``forward``: instances may have theirs wrapped)."""
    return inspect.signature(type(module).forward).bind(module, *args, **kwargs)


def hook_selecting(slices: list[tuple[Constant, list[int]]]) -> Callable[..., Any]:
    """A forward pre-hook that gives a layer the kept part of its constants; outer axes come first."""
    slices = sorted(slices, key=lambda item: -item[0].inner)

    def select(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = arguments_of(module, args, kwargs)
        for constant, kept in slices:
            tensor = bound.arguments.get(constant.argument)
            if isinstance(tensor, torch.Tensor):
                bound.arguments[constant.argument] = constant.select(tensor, kept)
        return bound.args[1:], bound.kwargs

    return select

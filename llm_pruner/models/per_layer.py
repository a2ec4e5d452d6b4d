"""Build models whose layers differ: the modelling half of transformers' ``per_layer_config``.

transformers 5 reads and writes configs with values of their own for each layer, but builds no model from them yet.
This module does, for any architecture: a layer that differs is built again by its own constructor, from its own config,
and replaces the uniform layer before any weight is loaded. Where transformers builds such layers itself, this part
yields to it.

Some widths have no field. GPT-2 derives the width of its attention from the hidden size, so no config has fewer heads;
BART has two stacks of layers and one config. For these blocks the config carries ``submodule_overrides``::

    {"h.3.attn": {"values": {"n_embd": 512, "n_head": 8}, "shapes": {"c_attn.weight": [768, 1536], ...}}}

The block is built as if the whole model were narrower, which makes its head count, split sizes and scales right; then
its leaves that face the hidden size get the stated shapes. ``attributes`` are set on the finished block: factors that
must not change with the hidden size. A block with ``absent`` is removed: its stand-in adds nothing to the residual
stream and returns that many values (0: no tuple). Paths begin at the smallest inner model that holds every stack of
layers built from this config.

Some heads depend on a constant that the model computes for all heads, such as ALiBi's slopes. The model keeps computing
it for all of them, and each layer takes the part of its own heads, stated in ``constant_slices``::

    {"h.3": [{"argument": "alibi", "dim": 0, "size": 16, "inner": 1, "kept": [0, 2, ...]}]}

Importing this module installs it in transformers, and :mod:`llm_pruner` sees to that, so that
``AutoModelForCausalLM.from_pretrained`` works. The file imports nothing else of the package: a checkpoint may carry a
copy of it, to be loaded without llm_pruner.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, modeling_utils
from transformers.pytorch_utils import Conv1D

CONFIG_LOGGER = "transformers.integrations.heterogeneity.configuration_utils"
SUBMODULES = "submodule_overrides"
CONSTANTS = "constant_slices"
Overrides = dict[str, Any]

# Where a config keeps how its blocks run: private names of transformers, checked on 5.23.
IMPLEMENTATION_SLOTS = {"attn": "_attn_implementation_internal", "experts": "_experts_implementation_internal"}
_HETEROGENEITY = "_heterogeneity_spec"  # where a config keeps its per-layer values: private, checked on 5.23


def install() -> None:
    """Teach transformers to build models from per-layer configs; do nothing the second time.

    This is the package's only lasting change to transformers: four methods of ``PreTrainedModel``.
    """
    if getattr(PreTrainedModel, "_llm_pruner_installed", False):
        return
    init, post_init = PreTrainedModel.__init__, PreTrainedModel.post_init

    @functools.wraps(init)
    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        if has_per_layer_widths(config) or _open_recordings:  # an inner model's file may be another than its outer's
            recording = ExitStack()
            recording.enter_context(recording_constructors(type(self)))
            # Ended by post_init, or by the death of a model whose construction failed.
            self.__dict__["_end_recording"] = weakref.finalize(self, recording.close)
        init(self, config, *args, **kwargs)

    @functools.wraps(post_init)
    def with_layers(self: PreTrainedModel) -> None:
        if has_per_layer_widths(self.config):
            _rebuild_layers(self)
        if (end_recording := self.__dict__.pop("_end_recording", None)) is not None:
            end_recording()
        post_init(self)

    PreTrainedModel.__init__ = __init__  # type: ignore[method-assign]
    PreTrainedModel.post_init = with_layers  # type: ignore[method-assign]
    for name in ("set_attn_implementation", "set_experts_implementation"):
        setattr(PreTrainedModel, name, _reaching_layers(getattr(PreTrainedModel, name)))
    PreTrainedModel._llm_pruner_installed = True  # type: ignore[attr-defined]


def transformers_builds_layers() -> bool:
    """Return True if transformers builds layers from per-layer configs itself; 5.23 does not.

    Its model class would have to name the feature, which its configs call heterogeneity.
    """
    names = set(vars(modeling_utils))
    for function in map(inspect.unwrap, filter(callable, vars(PreTrainedModel).values())):
        names.update(getattr(getattr(function, "__code__", None), "co_names", ()))
    return any("heterogene" in name.lower() for name in names)


def overrides_of(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """Return the blocks of a config that are built with other values, by path."""
    return getattr(config, SUBMODULES, None) or {}


def layer_overrides_of(config: PreTrainedConfig) -> dict[int, Overrides]:
    """Return the fields in which each layer differs from the config, by layer index; its own dict, not a copy."""
    return getattr(config, _HETEROGENEITY).per_layer_overrides if getattr(config, "is_heterogeneous", False) else {}


def has_per_layer_widths(config: PreTrainedConfig) -> bool:
    """Return True if a config gives layers or blocks of its model values of their own."""
    return bool(getattr(config, "is_heterogeneous", False) or overrides_of(config) or getattr(config, CONSTANTS, None))


def _reaching_layers(setter: Callable[..., None]) -> Callable[..., None]:
    """Let a change of implementation reach the configs of layers that differ, too."""

    @functools.wraps(setter)
    def change(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        setter(self, *args, **kwargs)
        for owner in (m for m in self.modules() if isinstance(m, PreTrainedModel) and has_per_layer_widths(m.config)):
            for module in owner.modules():
                config = getattr(module, "config", None)
                if isinstance(config, type(owner.config)) and config is not owner.config:
                    for slot in IMPLEMENTATION_SLOTS.values():
                        config.__dict__[slot] = owner.config.__dict__.get(slot)

    return change


@contextmanager
def recording_constructors(*classes: type) -> Iterator[None]:
    """Let modules that are constructed meanwhile remember their arguments; those of the classes' modelling files.

    A module's constructor is the only thing that knows how to make it right; its arguments are needed to call
    it again with another config. Classes of torch are left alone.

    Args:
        classes: classes of models or of parts of models; every class that their files define or import is recorded.
    """
    recorded = _recordable(classes)
    _open_recordings.append(recorded)
    for module_class in recorded:
        if module_class not in _recorders:
            original = module_class.__dict__["__init__"]
            _recorders[module_class] = [0, original]
            module_class.__init__ = _recording(original)  # type: ignore[misc]
        _recorders[module_class][0] += 1

    def drop_warning(_: logging.LogRecord) -> bool:
        """Drop the warning that a global value is read: layers are built from it first, then anew from their own."""
        return False

    logging.getLogger(CONFIG_LOGGER).addFilter(drop_warning)
    try:
        yield
    finally:
        logging.getLogger(CONFIG_LOGGER).removeFilter(drop_warning)
        _open_recordings.pop()
        for module_class in recorded:
            _recorders[module_class][0] -= 1
            if not _recorders[module_class][0]:
                module_class.__init__ = _recorders.pop(module_class)[1]  # type: ignore[misc]


_open_recordings: list[list[type]] = []  # classes that each open context records, which may be none
_recorders: dict[type, list[Any]] = {}  # how many contexts record a class, and its own constructor


def _recordable(classes: Iterable[type]) -> list[type]:
    """List the module classes in the files of some classes and their bases, without models and without torch's."""
    files = dict.fromkeys(base.__module__ for c in classes for base in c.__mro__ if issubclass(base, nn.Module))
    found = [value for file in files if not _is_torch(file) for value in vars(sys.modules[file]).values()]
    return [
        value
        for value in dict.fromkeys(value for value in found if isinstance(value, type))
        if issubclass(value, nn.Module)
        and not issubclass(value, PreTrainedModel)
        and not _is_torch(value.__module__)
        and "__init__" in value.__dict__
    ]


def _is_torch(module_name: str) -> bool:
    return module_name.partition(".")[0] == "torch"


def _recording(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.__dict__["_constructed_with"] = (type(self), args, kwargs)

    return __init__


def bind_constructor(module_class: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """Return the arguments of a constructor by name; the first is the module itself."""
    return inspect.signature(module_class.__init__).bind(None, *args, **kwargs)


def rebuild(module: nn.Module, overrides: Overrides | PreTrainedConfig) -> nn.Module:
    """Construct a module again from another config, or from its own with other values.

    A value that is also an argument of the constructor (some blocks are given ``num_heads``) is passed as argument.

    Raises:
        ValueError: the module's constructor was not recorded. The constructor may raise anything else for values
            that make no sense.
    """
    if "_constructed_with" not in module.__dict__:
        raise ValueError(f"{type(module).__name__} cannot be built again: its class is not of a modelling file")
    module_class, args, kwargs = module.__dict__["_constructed_with"]
    bound = bind_constructor(module_class, args, kwargs)
    for name, value in list(bound.arguments.items())[1:]:
        if isinstance(overrides, PreTrainedConfig):
            if isinstance(value, PreTrainedConfig):
                bound.arguments[name] = overrides
        elif isinstance(value, PreTrainedConfig):
            bound.arguments[name] = with_values(global_config(value), overrides)
        elif name in overrides:
            bound.arguments[name] = overrides[name]
    with recording_constructors(module_class):
        return module_class(*bound.args[1:], **bound.kwargs)


def with_values(config: PreTrainedConfig, values: Overrides) -> PreTrainedConfig:
    """Copy a config with some fields changed and nothing derived anew."""
    out = copy.copy(config)
    for name, value in values.items():
        set_field(out, name, value)
    return out


def set_field(config: PreTrainedConfig, name: str, value: Any) -> None:
    """Change a field, or ``part.field`` of a config inside, which is copied first."""
    outer, _, inner = name.partition(".")
    if inner:
        part = copy.copy(getattr(config, outer))
        set_field(part, inner, value)
        setattr(config, outer, part)
    else:
        setattr(config, name, value)


def global_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Copy a config without its per-layer values."""
    out = copy.copy(config)
    out.__dict__.pop(_HETEROGENEITY, None)
    return out


def layer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the stacks of decoder (or encoder) layers by path: the outermost module lists of the model.

    A list with a member without parameters is not a stack.
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
    """Return the model's own list of decoder layers, not that of an inner model with a config of its own."""
    for path, stack in layer_lists(model).items():
        parents = [model.get_submodule(p) for p in _ancestors(path)]
        if len(stack) == layers and not any(isinstance(p, PreTrainedModel) and p is not model for p in parents):
            return stack
    return None


def _ancestors(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _rebuild_layers(model: PreTrainedModel) -> None:
    """Replace the layers and blocks that a model's config gives values of their own."""
    config = model.config
    if (differing := layer_overrides_of(config)) and not transformers_builds_layers():
        stack = stack_of(model, config.num_hidden_layers) or nn.ModuleList()
        for i in range(len(stack)):
            if differing.get(i):
                stack[i] = rebuild(stack[i], config.per_layer_config[i])
    overrides = overrides_of(config)
    for path in sorted(overrides, key=lambda path: path.count(".")):  # a layer before the blocks in it
        _override_block(model, path, overrides[path])
    for path, entries in (getattr(config, CONSTANTS, None) or {}).items():
        if (layer := _submodule(model, path)) is None:
            continue
        for entry in entries:  # in the order in which they were cut
            constant = Constant(path, entry["argument"], entry["dim"], entry["size"], entry["inner"])
            layer.register_forward_pre_hook(hook_selecting([(constant, entry["kept"])]), with_kwargs=True)


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a path, None where the path begins at another model, around this one or inside it."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _override_block(model: PreTrainedModel, path: str, recipe: dict[str, Any]) -> None:
    """Replace one block as its entry in ``submodule_overrides`` says."""
    block = _submodule(model, path)
    if block is None:
        return
    if "absent" in recipe:
        model.set_submodule(path, Absent(recipe["absent"]))
        return
    if recipe["values"] or recipe["shapes"]:
        block = rebuild(block, recipe["values"])
        for name, shape in recipe["shapes"].items():
            _resize(block, name, tuple(shape))
        model.set_submodule(path, block)
    for name, value in recipe.get("attributes", {}).items():
        if hasattr(block, name):
            setattr(block, name, value)


class Absent(nn.Module):
    """The stand-in of a removed block: it adds nothing to the residual stream and returns ``outputs`` values (0: no
    tuple)."""

    def __init__(self, outputs: int):
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        nothing = torch.zeros_like(args[0] if args else kwargs["hidden_states"])
        return (nothing, *[None] * (self.outputs - 1)) if self.outputs else nothing


def _resize(block: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    """Give a leaf's parameter another shape, and the leaf the attributes that state it."""
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
    """A constant that a layer is given: dim ``dim`` of its argument ``argument``, seen as ``[..., size, inner]``."""

    layer: str
    argument: str
    dim: int
    size: int
    inner: int

    def select(self, tensor: torch.Tensor, kept: Iterable[int]) -> torch.Tensor:
        """Return the tensor with only the ``kept`` indices of the axis, in that order."""
        index = torch.tensor(list(kept), device=tensor.device)
        parts = tensor.unflatten(self.dim, (-1, self.size, self.inner))
        return parts.index_select(self.dim + 1, index).flatten(self.dim, self.dim + 2)


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    """Return a call's arguments by name, read from the class's ``forward``: an instance's own may be wrapped."""
    return inspect.signature(type(module).forward).bind(module, *args, **kwargs)


def hook_selecting(slices: list[tuple[Constant, list[int]]]) -> Callable[..., Any]:
    """Make a forward pre-hook that gives a layer the kept part of its constants; outer axes come first."""
    slices = sorted(slices, key=lambda item: -item[0].inner)

    def select(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = arguments_of(module, args, kwargs)
        for constant, kept in slices:
            tensor = bound.arguments.get(constant.argument)
            if isinstance(tensor, torch.Tensor):
                bound.arguments[constant.argument] = constant.select(tensor, kept)
        return bound.args[1:], bound.kwargs

    return select


install()

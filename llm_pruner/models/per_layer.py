"""Build models whose layers differ: the modelling half of transformers' ``per_layer_config``.

transformers 5 reads and writes configs with values of their own for each layer, but builds no model from them yet.
This module does, for any architecture: a layer that differs is built again by its own constructor, from its own config,
and replaces the uniform layer before any weight is loaded. It yields to layers that transformers has built itself.
docs/reference/file-formats.md describes the entries of such a config.

Importing this module installs it in transformers. It imports nothing else of the package: a checkpoint may carry a
copy of the file, to be loaded without llm_pruner.
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
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, modeling_utils
from transformers.pytorch_utils import Conv1D

CONFIG_LOGGER = "transformers.integrations.heterogeneity.configuration_utils"
SUBMODULES = "submodule_overrides"
CONSTANTS = "constant_slices"
Overrides = dict[str, Any]
SKIP = "skip"  # in per_layer_config: kinds of blocks that a layer lacks, for transformers' own modelling half
# In config.json where a kernel's name is expected: transformers checks it before it builds layers, and repeats it.
REFUSAL_FIELD = "experts_implementation"
REFUSAL = (
    "this checkpoint has layers of different widths: pip install llm_pruner and import llm_pruner first; with a "
    "modeling_pruned.py in its folder, trust_remote_code=True does as well"
)

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
        if isinstance(config, PreTrainedConfig):  # anything else is transformers' to refuse
            _lift_refusal(config)
        if has_per_layer_widths(config) or _open_recordings:  # an inner model's file may be another than its outer's
            recording = ExitStack()
            recording.enter_context(recording_constructors(type(self)))
            # Ended by post_init, or by the death of a model whose construction failed.
            self.__dict__["_end_recording"] = weakref.finalize(self, recording.close)
        init(self, config, *args, **kwargs)

    @functools.wraps(post_init)
    def with_layers(self: PreTrainedModel) -> None:
        rebuilt = has_per_layer_widths(self.config) and _rebuild_layers(self)
        if rebuilt or any(map(_refuses, parts_of(self.config))):
            setattr(self.config, REFUSAL_FIELD, REFUSAL)
        if (end_recording := self.__dict__.pop("_end_recording", None)) is not None:
            end_recording()
        post_init(self)

    PreTrainedModel.__init__ = __init__  # type: ignore[method-assign]
    PreTrainedModel.post_init = with_layers  # type: ignore[method-assign]
    for name in ("set_attn_implementation", "set_experts_implementation"):
        setattr(PreTrainedModel, name, _reaching_layers(getattr(PreTrainedModel, name)))
    PreTrainedModel._llm_pruner_installed = True  # type: ignore[attr-defined]


def transformers_builds_layers() -> bool:
    """Return True if transformers' model class names per-layer configs ("heterogeneous"); that of 5.23 does not."""
    methods = map(inspect.unwrap, filter(callable, vars(PreTrainedModel).values()))
    used = (name for method in methods for name in getattr(getattr(method, "__code__", None), "co_names", ()))
    return any("heterogene" in name.lower() for name in (*vars(modeling_utils), *used))


def overrides_of(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """Return the blocks of a config that are built with other values, by path."""
    return getattr(config, SUBMODULES, None) or {}


def layer_overrides_of(config: PreTrainedConfig) -> dict[int, Overrides]:
    """Return the fields in which each layer differs from the config, by layer index; its own dict, not a copy."""
    return getattr(config, _HETEROGENEITY).per_layer_overrides if getattr(config, "is_heterogeneous", False) else {}


def has_per_layer_widths(config: PreTrainedConfig) -> bool:
    """Return True if a config gives layers or blocks of its model values of their own."""
    return bool(getattr(config, "is_heterogeneous", False) or overrides_of(config) or getattr(config, CONSTANTS, None))


def parts_of(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """List a config and those inside it."""
    return [config, *(p for v in vars(config).values() if isinstance(v, PreTrainedConfig) for p in parts_of(v))]


def _refuses(config: PreTrainedConfig, field: str = REFUSAL_FIELD) -> bool:
    return "llm_pruner" in str(config.__dict__.get(field))


def _lift_refusal(config: PreTrainedConfig) -> None:
    """Let a model be built from a config that was read from a file; drop a refusal that has no reason any more."""
    parts, read = parts_of(config), IMPLEMENTATION_SLOTS["experts"]  # where transformers keeps what the file says
    for part in parts:
        if _refuses(part, read):
            part.__dict__[read] = None
        if _refuses(part) and not any(map(has_per_layer_widths, parts)):
            delattr(part, REFUSAL_FIELD)


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
    it again with another config. Every class that their files define or import is recorded, except torch's.
    """
    recorded = _recordable(classes)
    _open_recordings.append(recorded)
    for module_class in recorded:
        if module_class not in _recorders:
            original = module_class.__dict__["__init__"]
            _recorders[module_class] = [0, original]
            module_class.__init__ = _recording(original)  # type: ignore[misc]
        _recorders[module_class][0] += 1

    # Layers are built from global values first, then anew from their own: no reason to warn.
    logging.getLogger(CONFIG_LOGGER).addFilter(drop_all := logging.Filter("nothing"))
    try:
        yield
    finally:
        logging.getLogger(CONFIG_LOGGER).removeFilter(drop_all)
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
    found = [value for file in files if not file.startswith("torch.") for value in vars(sys.modules[file]).values()]
    return [
        value
        for value in dict.fromkeys(value for value in found if isinstance(value, type))
        if issubclass(value, nn.Module)
        and not issubclass(value, PreTrainedModel)
        and not value.__module__.startswith("torch.")
        and "__init__" in value.__dict__
    ]


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
        ValueError: the module's constructor was not recorded; for values that make no sense it may raise anything.
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
    """Return the stacks of layers by path: the outermost lists of modules with parameters that are no lists."""
    stacks: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        nested = any(path.startswith(f"{outer}.") for outer in stacks)
        members = list(module) if isinstance(module, nn.ModuleList) and not nested else []
        lists = any(isinstance(member, (nn.ModuleList, nn.ModuleDict)) for member in members)
        if members and not lists and all(list(member.parameters()) for member in members):
            stacks[path] = module
    return stacks


def stack_of(model: nn.Module, layers: int) -> nn.ModuleList | None:
    """Return the model's own list of decoder layers, not that of an inner model with a config of its own."""
    for path, stack in layer_lists(model).items():
        parents = [model.get_submodule(p) for p in accumulate(path.split(".")[:-1], "{}.{}".format)]
        if len(stack) == layers and not any(isinstance(p, PreTrainedModel) and p is not model for p in parents):
            return stack
    return None


def _rebuild_layers(model: PreTrainedModel) -> bool:
    """Replace layers and blocks that a config gives values of their own; return True if that takes this module."""
    config = model.config
    before = [(name, parameter.shape) for name, parameter in model.named_parameters()]
    if differing := layer_overrides_of(config):
        stack = stack_of(model, config.num_hidden_layers) or nn.ModuleList()
        for i in range(len(stack)):
            if differing.get(i, {}).keys() - {SKIP} and not (transformers_builds_layers() and _is_built(stack[i])):
                stack[i] = rebuild(stack[i], config.per_layer_config[i])
    overrides = overrides_of(config)
    for path in sorted(overrides, key=lambda path: path.count(".")):  # a layer before the blocks in it
        _override_block(model, path, overrides[path])
    constants = getattr(config, CONSTANTS, None) or {}
    for path, entries in constants.items():
        if (layer := _submodule(model, path)) is None:
            continue
        for entry in entries:  # in the order in which they were cut
            constant = Constant(path, entry["argument"], entry["dim"], entry["size"], entry["inner"])
            layer.register_forward_pre_hook(hook_selecting([(constant, entry["kept"])]), with_kwargs=True)
    stated = constants or any("absent" not in recipe for recipe in overrides.values())
    # Some architectures build layers from per-layer configs themselves: nothing changes then.
    return bool(stated) or before != [(name, parameter.shape) for name, parameter in model.named_parameters()]


def _is_built(layer: nn.Module) -> bool:
    """Return True if the parts of a layer were constructed from a config without per-layer values."""
    parts = [vars(part).get("_constructed_with", (None, (), {})) for part in layer.modules() if part is not layer]
    given = [value for _, args, kwargs in parts for value in (*args, *kwargs.values())]
    configs = [value for value in given if isinstance(value, PreTrainedConfig)]
    return bool(configs) and not any(config.is_heterogeneous for config in configs)


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a path, None if the path begins at another model, around this one or inside it."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _override_block(model: PreTrainedModel, path: str, recipe: dict[str, Any]) -> None:
    """Replace one block as its entry in ``submodule_overrides`` says."""
    if (block := _submodule(model, path)) is None:
        return
    if "absent" in recipe:
        if list(block.parameters()):  # otherwise transformers has left it out already
            model.set_submodule(path, Absent(recipe["absent"], recipe.get("passes", ())))
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
    """The stand-in of a removed block: it adds nothing to the residual stream, and passes on arguments that the block
    returns (``passes``, a name for each output). ``outputs`` of 0 means no tuple."""

    def __init__(self, outputs: int, passes: Iterable[str | None] = ()):
        super().__init__()
        self.outputs, self.passes = outputs, list(passes) or [None] * outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        nothing = torch.zeros_like(args[0] if args else kwargs["hidden_states"])
        return (nothing, *(kwargs.get(name or "") for name in self.passes[1:])) if self.outputs else nothing


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

"""Find stacks of layers and the configs that they are built from; drop whole layers of them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import PrunerError
from ...graph.blocks import block_of, block_outputs
from ...graph.units import CouplingGraph
from ...models.constructors import fields_of
from ...models.layers import is_below
from ...models.per_layer import CONSTANTS, SKIP, SUBMODULES, layer_lists, layer_overrides_of, overrides_of, set_field
from ...models.skeleton import skeleton
from ...selection.plan import PruningPlan, name_after
from .token_ids import names_tokens

BLOCK_NAMES = {"heads": "attention", "neurons": "mlp"}  # in per_layer_config, by kind of the units that a block holds
FEATURE_LAYERS = re.compile("_feature_layers?$")  # fields: hidden states of a tower that a model reads
LEADING_LAYERS = ("max_window_layers", "first_k_dense_replace")  # fields: so many layers come first, of another kind


@dataclass
class Stack:
    """A stack of layers.

    ``path`` is where it is in the model, ``scope`` where the smallest model begins that holds all stacks built from
    the same config, and ``config`` how to get from the model's config to that one. ``standard`` says whether
    ``per_layer_config`` of that config means the layers of this stack and no others.
    """

    path: str
    length: int
    config: tuple[str, ...]
    scope: str = ""
    standard: bool = False

    def inside(self, index: int, path: str = "") -> str:
        """Return the path of a block of layer ``index``, from the scope."""
        return f"{self.path}.{index}.{path}".removeprefix(f"{self.scope}." if self.scope else "").rstrip(".")


def stacks_of(model: PreTrainedModel) -> list[Stack]:
    """Return the stacks of a model's layers; those that no config of the model is the config of are left out."""
    configs = dict(configs_in(model.config))
    owners = {path: m for path, m in model.named_modules() if isinstance(m, PreTrainedModel)}
    stacks = []
    for path, layers in layer_lists(model).items():
        owner = owners[max((p for p in owners if is_below(p, path)), key=len)]
        same = [where for where, config in configs.items() if config is owner.config]
        # Some models give their parts copies of their own config.
        same += [where for where, config in configs.items() if type(config) is type(owner.config)]
        if same:
            stacks.append(Stack(path, len(layers), same[0]))
    for stack in stacks:
        together = [other.path for other in stacks if other.config == stack.config]
        config = configs[stack.config]
        around = [p for p, m in owners.items() if is_below(p, stack.path) and type(m.config) is type(config)]
        # Two towers may be built from one config without a model of that config around both.
        scopes = [p for p in around if all(is_below(p, path) for path in together)] or around
        stack.scope = max(scopes, key=len)
        stack.standard = len(together) == 1 and stack.length == getattr(config, "num_hidden_layers", None)
    return stacks


def configs_in(
    config: PreTrainedConfig, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], PreTrainedConfig]]:
    """Yield a config and those inside it, with their paths."""
    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from configs_in(value, (*path, name))


def without_layers(
    model: PreTrainedModel, config: PreTrainedConfig, stacks: list[Stack], plan: PruningPlan
) -> PreTrainedConfig:
    """Return the config of the model without the layers that a plan drops, all else as it is.

    Fields with an entry for each layer lose those of the layers that go, and lists of layers' indices are renumbered.
    How many layers there are, and how many of them come before others of another kind, is a whole number in some
    field; which one, the shapes of the model that it gives say.

    Raises:
        PrunerError: no field expresses what is left.
    """
    config, plan = copy.deepcopy(config), replace(plan, blocks=[])
    wanted = {
        new: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if (new := name_after(name, plan)) is not None
    }
    parts = dict(configs_in(config))
    done: dict[str, torch.Tensor] = {}
    for path, kept in plan.layers.items():
        stack = next((s for s in stacks if s.path == path), None)
        if stack is None:
            raise PrunerError(f"layers cannot be dropped from {path}: no config of the model is theirs")
        part, order = parts[stack.config], kept.tolist()
        overrides = layer_overrides_of(part)
        layers = {new: dict(overrides[old]) for new, old in enumerate(order) if overrides.get(old)}
        if part.is_heterogeneous:
            part.per_layer_config = None
        for name, value in list(vars(part).items()):
            if isinstance(value, list) and not (name.startswith("_") or names_tokens(name)):
                setattr(part, name, _entries(value, stack.length, order))
            elif name in LEADING_LAYERS and type(value) is int and value <= stack.length:
                set_field(part, name, sum(layer < value for layer in order))
        for key in (SUBMODULES, CONSTANTS):
            if entries := getattr(part, key, None):
                setattr(part, key, _renumber_layers(entries, stack, order))
        _fit_feature_layers(config, stack, order)
        _set_layer_count(model, config, part, stack, len(order), done)
        done[path] = kept
        if layers:
            part.allow_global_per_layer_attribute_access = True
            part.per_layer_config = cast(Any, layers)
    return _fit_layer_pattern(type(model), config, wanted)


def without_blocks(model: PreTrainedModel, config: PreTrainedConfig, plan: PruningPlan, graph: CouplingGraph) -> None:
    """Record the blocks that a plan removes in a config that has the layers which the plan leaves.

    Blocks that transformers has a name for are also recorded in ``per_layer_config``, which transformers reads itself.

    Raises:
        PrunerError: a block is in no layer, or has to stay.
    """
    parts, stacks = dict(configs_in(config)), stacks_of(skeleton(type(model), config))
    others = replace(plan, blocks=[])
    for path in plan.blocks:
        new = name_after(f"{path}.", others)
        stack = next((s for s in stacks if new and new.startswith(f"{s.path}.")), None)
        if new is None:  # it lies in a layer that is removed
            continue
        if stack is None:
            raise PrunerError(f"{path} lies in no layer: only blocks of layers can be removed")
        layer, _, inner = new[len(stack.path) + 1 : -1].partition(".")
        entry = {"values": {}, "shapes": {}, **block_outputs(model, path)}
        part = parts[stack.config]
        setattr(part, SUBMODULES, overrides_of(part) | {stack.inside(int(layer), inner): entry})
        if stack.standard and (name := _name_in_transformers(model, graph, stack, path)):
            layers = {i: dict(own) for i, own in layer_overrides_of(part).items()}
            own = layers.setdefault(int(layer), {})
            own[SKIP] = sorted({*own.get(SKIP, []), name})
            part.per_layer_config = cast(Any, layers)


def _name_in_transformers(model: PreTrainedModel, graph: CouplingGraph, stack: Stack, path: str) -> str | None:
    """Return the name for ``skip`` of a block that holds all heads or all neurons of its layer, None for another."""
    layer = int(path[len(stack.path) + 1 :].partition(".")[0])
    for kind, name in BLOCK_NAMES.items():
        with suppress(PrunerError):
            if block_of(model, graph, stack.path, layer, kind=kind) == path:
                return name
    return None


def _entries(values: list[Any], length: int, order: list[int]) -> list[Any]:
    """Return a list with an entry for each layer, or one of layers' indices, after the layers of ``order`` are left."""
    if len(values) == length:
        return [values[i] for i in order]
    indices = all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    if values and indices and values == sorted(set(values)) and values[0] >= 0 and values[-1] < length:
        return [order.index(i) for i in values if i in order]
    return values


def _fit_feature_layers(config: PreTrainedConfig, stack: Stack, order: list[int]) -> None:
    """Let a config that names hidden states of a tower, counted from either end, name those of the kept layers."""
    *outer, own = stack.config or ("",)
    around, tower = dict(configs_in(config))[tuple(outer)], own.removesuffix("config")

    def moved(state: int) -> int:
        before = sum(layer < state % (stack.length + 1) for layer in order)
        return before if state >= 0 else before - len(order) - 1

    for name, value in list(vars(around).items()):
        if tower and name.startswith(tower) and FEATURE_LAYERS.search(name) and value is not None:
            setattr(around, name, moved(value) if isinstance(value, int) else [moved(one) for one in value])


def _renumber_layers(entries: dict[str, Any], stack: Stack, order: list[int]) -> dict[str, Any]:
    """Return entries by path of a layer under the layers' new paths, without those of dropped layers."""
    renumbered = {}
    start = stack.inside(0).rpartition(".")[0]
    for path, value in entries.items():
        match = re.fullmatch(rf"{re.escape(start)}\.(\d+)(\..*)?", path)
        if match is None:
            renumbered[path] = value
        elif int(match[1]) in order:
            renumbered[f"{start}.{order.index(int(match[1]))}{match[2] or ''}"] = value
    return renumbered


def _set_layer_count(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    part: PreTrainedConfig,
    stack: Stack,
    count: int,
    done: dict[str, torch.Tensor],
) -> None:
    """Set the field that counts a stack's layers; those of other stacks are ``done`` or as in the model.

    No field has to be set where a list with an entry for each layer, which is shorter by now, gives their number.
    """

    def found() -> dict[str, int]:
        try:
            return {path: len(layers) for path, layers in layer_lists(skeleton(type(model), config)).items()}
        except Exception:  # a constructor may refuse a config in any way it likes
            return {}

    wanted = {path: len(layers) for path, layers in layer_lists(model).items()} | {stack.path: count}
    wanted |= {path: len(kept) for path, kept in done.items()}
    fields = [n for n, v in fields_of(part).items() if type(v) is int and v == stack.length]
    fields.sort(key=lambda name: name != part.attribute_map.get("num_hidden_layers", "num_hidden_layers"))
    if found() == wanted:
        return
    for name in fields:
        set_field(part, name, count)
        if found() == wanted:
            return
        set_field(part, name, stack.length)
    raise PrunerError(f"no field of {type(part).__name__} counts the layers of {stack.path}")


def _fit_layer_pattern(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, wanted: dict[str, tuple[int, ...]]
) -> PreTrainedConfig:
    """Return the config, if need be with one more number changed, such as the number of leading dense layers."""

    def fits(config: PreTrainedConfig) -> bool:
        try:
            found = skeleton(model_class, config).state_dict()
        except Exception:
            return False
        return {name: tuple(t.shape) for name, t in found.items()} == wanted

    if fits(config):
        return config
    for name, value in fields_of(config).items():
        if type(value) is int and re.search("layer|dense|first|step|interval|freq", name) and value <= 256:
            for other in range(value):
                tried = copy.deepcopy(config)
                set_field(tried, name, other)
                if fits(tried):
                    return tried
    raise PrunerError(
        f"no config of {type(config).__name__} has the layers that are left: they are of several kinds, whose order "
        "is fixed; drop others"
    )

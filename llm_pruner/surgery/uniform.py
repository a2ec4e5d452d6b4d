"""Pad layers of different widths with zeros to one width, for programs without per-layer configs."""

from __future__ import annotations

import copy
from collections import defaultdict
from itertools import product

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import PrunerError
from ..graph.units import CouplingGraph, Unit, trace
from ..models.blockwise import native_compute
from ..models.constructors import refusal
from ..models.inputs import example_inputs
from ..models.per_layer import (
    CONSTANTS,
    SKIP,
    SUBMODULES,
    global_config,
    has_per_layer_widths,
    layer_overrides_of,
    overrides_of,
)
from ..models.running import relative_difference
from ..models.skeleton import canonical_names, skeleton
from .equivalence import changed_logits
from .rebuild import build_from_state

OVERRIDDEN = "allow_global_per_layer_attribute_access"  # transformers' own field beside per-layer values
PADDING_TOLERANCE = 1e-5  # of the largest logit; sums of more numbers, the added ones zero, are taken in another order


def to_uniform(model: PreTrainedModel) -> PreTrainedModel:
    """Return a plain model of the architecture with the same logits, every layer padded to the width of the widest.

    Added weights are zero, so that they add nothing to any output.

    Raises:
        PrunerError: the layers differ in more than widths of their config, or zeros would change the logits: if an
            operator normalises over the padded axis, or routes tokens along it.
    """
    if not has_per_layer_widths(model.config):
        raise PrunerError("the layers of this model have the same widths already: it is a plain checkpoint")
    config = uniform_config(model.config)
    target = skeleton(type(model), config)
    canonical = canonical_names(target)
    shapes = {canonical[n]: tuple(t.shape) for n, t in target.state_dict().items() if n in canonical}
    tensors = {canonical[n]: t for n, t in model.state_dict().items() if n in canonical}
    places = _places(tensors, shapes, trace(model), trace(target))
    done = {name: _padded(tensor, shapes[name], places[name]) for name, tensor in tensors.items()}
    # A removed block is built again, and adds nothing.
    done |= {name: next(iter(done.values())).new_zeros(shape) for name, shape in shapes.items() if name not in done}
    state = {name: done[canonical[name]] if name in canonical else t for name, t in target.state_dict().items()}
    padded = build_from_state(config, state, model)
    ids = example_inputs(model, rows=2, tokens=16)
    dtype = native_compute(model).dtype
    actual, expected = (changed_logits(m, ids, dtype, lambda _, t: t) for m in (padded, model))
    off = relative_difference(actual, expected)
    if off > PADDING_TOLERANCE:
        raise PrunerError(
            f"padding with zeros changes the logits of this model by {off:.1e}: prune with --uniform instead"
        )
    return padded


def uniform_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config without per-layer values, every field that differs by layer at its largest."""
    blocks = overrides_of(config).values()
    if getattr(config, CONSTANTS, None) or any(block.get("attributes") for block in blocks):
        raise PrunerError(
            f"no plain config of {type(config).__name__} has such layers: they have constants of their own"
        )
    uniform = global_config(config)
    for name in (SUBMODULES, OVERRIDDEN):  # these blocks are as wide as they were before any pruning
        uniform.__dict__.pop(name, None)
    differing = layer_overrides_of(config).values()
    for field in dict.fromkeys(field for overrides in differing for field in overrides if field != SKIP):
        values = [getattr(config.per_layer_config[i], field) for i in range(config.num_hidden_layers)]
        if None in values:  # that is, as wide as the hidden size makes it: more than any that was cut
            setattr(uniform, field, None)
        elif all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            setattr(uniform, field, max(values))
        else:
            raise PrunerError(f"the layers differ in {field}, which is not a width")
    return _with_valid_heads(uniform)


def _with_valid_heads(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config with the next larger number of heads that it does not refuse; the added heads are zero.

    Many configs refuse heads that do not divide the hidden size, even where heads have a size of their own.

    Raises:
        PrunerError: it refuses its values whatever the number of heads.
    """
    refused = refusal(config)
    if not refused:
        return config
    text = config.get_text_config()
    heads, groups = text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    for more in range(groups + 1, text.hidden_size + 1) if heads % groups == 0 else ():
        wider = copy.deepcopy(config)
        inner = wider.get_text_config()
        inner.num_attention_heads = more * (heads // groups)
        if hasattr(inner, "num_key_value_heads"):
            inner.num_key_value_heads = more
        if not refusal(wider):
            return wider
    raise PrunerError(f"the config refuses layers as wide as the widest: {refused}")


def _places(
    tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]], graph: CouplingGraph, wide: CouplingGraph
) -> dict[str, list[torch.Tensor]]:
    """Return, for every dim of every tensor, the positions in the wider tensor that its own get.

    Args:
        shapes: shapes of the wider model's tensors.
        graph: units of the narrow model.
        wide: units of the wider model.
    """
    units: dict[tuple[str, int], list[Unit]] = defaultdict(list)
    for unit in [*wide.units, *wide.frozen]:
        for key in unit.dims:
            units[key].append(unit)
    lengths = {(name, dim): size for name, tensor in tensors.items() for dim, size in enumerate(tensor.shape)}
    grown = [
        (name, dim)
        for name, shape in shapes.items()
        for dim, size in enumerate(shape)
        if lengths.get((name, dim), size) != size
    ]
    kept = {unit.name: unit.size for unit in [*wide.units, *wide.frozen]}  # indices of each unit, from the first on
    narrow = {unit.name: unit.size for unit in [*graph.units, *graph.frozen]}
    for group in {tuple(sorted({unit.name for unit in units[key]})) for key in grown}:
        dims = [key for key in grown if not {unit.name for unit in units[key]}.isdisjoint(group)]
        kept |= _fit_sizes(dims, lengths, shapes, units, narrow=narrow, wide=kept)
    return {
        name: [_positions(units[name, dim], (name, dim), size, kept) for dim, size in enumerate(shape)]
        for name, shape in shapes.items()
    }


def _fit_sizes(
    dims: list[tuple[str, int]],
    lengths: dict[tuple[str, int], int],
    shapes: dict[str, tuple[int, ...]],
    units: dict[tuple[str, int], list[Unit]],
    *,
    narrow: dict[str, int],
    wide: dict[str, int],
) -> dict[str, int]:
    """Return how many indices each unit of some dims has in the narrow model, such that all dims get their lengths.

    An axis of one index is no axis of the narrow model, where another unit may have its name. So each size that a unit
    may have is tried; layer by layer, these are few.

    Raises:
        PrunerError: no sizes fit.
    """
    names = dict.fromkeys(unit.name for key in dims for unit in units[key])
    options = [dict.fromkeys((narrow.get(name, 1), 1, wide[name])) for name in names]
    for choice in product(*options):
        sizes = dict(zip(names, choice, strict=True))
        if all(len(_positions(units[n, d], (n, d), shapes[n][d], sizes)) == lengths[n, d] for n, d in dims):
            return sizes
    name, dim = dims[0]
    raise PrunerError(
        f"{name} has {lengths[name, dim]} channels, which do not fit into the {shapes[name][dim]} of other layers"
    )


def _positions(units: list[Unit], key: tuple[str, int], length: int, sizes: dict[str, int]) -> torch.Tensor:
    """Return the positions of a dim that lie in the first ``sizes`` indices of each of its units."""
    stays = torch.ones(length, dtype=torch.bool)
    for unit in units:
        stays &= unit.dims[key] < sizes[unit.name]
    return stays.nonzero().flatten()


def _padded(tensor: torch.Tensor, shape: tuple[int, ...], places: list[torch.Tensor]) -> torch.Tensor:
    if tuple(tensor.shape) == shape:
        return tensor.clone()
    padded = tensor.new_zeros(shape)
    padded[torch.meshgrid(*(place.to(tensor.device) for place in places), indexing="ij")] = tensor
    return padded

"""From widths that differ by layer to one width for all, by zeros: for programs that read nothing else."""

from __future__ import annotations

from collections import defaultdict
from itertools import product

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import PrunerError
from ..graph.units import CouplingGraph, Unit, trace
from ..models.blockwise import native_compute
from ..models.per_layer import CONSTANTS, SUBMODULES, global_config, has_per_layer_widths, overrides_of
from ..models.running import random_tokens, relative_difference
from ..models.skeleton import canonical_names, skeleton
from .equivalence import _changed_logits
from .rebuild import build_from_state

PADDING_TOLERANCE = 1e-5  # of the largest logit; sums of more numbers, the added ones zero, are taken in another order


def to_uniform(model: PreTrainedModel) -> PreTrainedModel:
    """The same function as a plain model of its architecture, every layer as wide as the widest.

    Weights that are added are zero, so that what they compute is zero where it is read.

    Raises:
        PrunerError: the layers differ in more than widths of their config, or zeros would change the logits, as they
            do where something is normalised over the units or routed among them.
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
    # A block that was gone comes back, and adds nothing.
    done |= {name: next(iter(done.values())).new_zeros(shape) for name, shape in shapes.items() if name not in done}
    state = {name: done[canonical[name]] if name in canonical else t for name, t in target.state_dict().items()}
    padded = build_from_state(config, state, model)
    ids = random_tokens(model, rows=2, tokens=16)
    dtype = native_compute(model).dtype
    found, expected = (_changed_logits(m, ids, dtype, lambda _, t: t) for m in (padded, model))
    off = relative_difference(found, expected)
    if off > PADDING_TOLERANCE:
        raise PrunerError(
            f"zeros change what this model computes (its logits by {off:.1e}): it cannot be made uniform so"
        )
    return padded


def uniform_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config without per-layer values, every field that differs by layer at its largest."""
    blocks = overrides_of(config).values()
    if getattr(config, CONSTANTS, None) or any(block.get("attributes") for block in blocks):
        raise PrunerError(
            f"no plain config of {type(config).__name__} has such layers: they have constants of their own"
        )
    out = global_config(config)
    out.__dict__.pop(SUBMODULES, None)  # these blocks are as wide as they were before any pruning
    spec = config._heterogeneity_spec.per_layer_overrides if config.is_heterogeneous else {}
    for field in dict.fromkeys(field for overrides in spec.values() for field in overrides):
        values = [getattr(config.per_layer_config[i], field) for i in range(config.num_hidden_layers)]
        if None in values:  # that is, as wide as the hidden size makes it: more than any that was cut
            setattr(out, field, None)
        elif all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            setattr(out, field, max(values))
        else:
            raise PrunerError(f"the layers differ in {field}, which is no width")
    return out


def _places(
    tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]], graph: CouplingGraph, wide: CouplingGraph
) -> dict[str, list[torch.Tensor]]:
    """Where the positions of every dim of every tensor come to lie in the wider one."""
    narrow = {unit.name: unit.size for unit in [*graph.units, *graph.frozen]}
    units = [*wide.units, *wide.frozen]
    at: dict[tuple[str, int], list[Unit]] = defaultdict(list)
    for unit in units:
        for key in unit.dims:
            at[key].append(unit)
    grown = [
        (n, d)
        for n, shape in shapes.items()
        for d, size in enumerate(shape)
        if n in tensors and tensors[n].shape[d] != size
    ]
    sizes = {unit.name: unit.size for unit in units}

    def place(name: str, dim: int) -> torch.Tensor:
        stays = torch.ones(shapes[name][dim], dtype=torch.bool)
        for unit in at[name, dim]:
            stays &= unit.dims[name, dim] < sizes[unit.name]
        return stays.nonzero().flatten()

    # An axis that was left with one index is none any more, and another may have its name: of the sizes that each may
    # have, those are right that fit everywhere. Layer by layer, there are few.
    for group in {tuple(sorted({u.name for u in at[key]})) for key in grown}:
        dims = [key for key in grown if {u.name for u in at[key]} & set(group)]
        known = dict.fromkeys(u.name for key in dims for u in at[key])
        options = [dict.fromkeys((narrow.get(name, 1), 1, sizes[name])) for name in known]
        for choice in product(*options):
            sizes.update(zip(known, choice, strict=True))
            if all(len(place(*key)) == tensors[key[0]].shape[key[1]] for key in dims):
                break
        else:
            name, dim = dims[0]
            raise PrunerError(
                f"{name} has {tensors[name].shape[dim]} channels, which do not fit into the {shapes[name][dim]} of "
                "other layers"
            )
    return {name: [place(name, dim) for dim in range(len(shape))] for name, shape in shapes.items()}


def _padded(tensor: torch.Tensor, shape: tuple[int, ...], places: list[torch.Tensor]) -> torch.Tensor:
    if tuple(tensor.shape) == shape:
        return tensor.clone()
    out = tensor.new_zeros(shape)
    out[torch.meshgrid(*(place.to(tensor.device) for place in places), indexing="ij")] = tensor
    return out

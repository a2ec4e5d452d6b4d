"""Aggregate numbers per channel of weights to one score per index of a unit (LLM-Pruner, section 3.2).

A unit runs through one dim of several weights: the rows of ``q_proj``, the columns of ``o_proj``. Each of these dims
has one number per channel. The numbers are aggregated over the dims, channel by channel, and then summed over the
channels of an index (the head_dim channels of a head).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from ..graph.units import Unit
from .scores import Dims, Salience


def _product(slices: torch.Tensor) -> torch.Tensor:
    """Return the product over slices ``[slices, ...]``, or its root of their number where float64 cannot hold it.

    Hidden channels run through hundreds of slices. The root leaves their order as it is.
    """
    product = slices.prod(0)
    magnitudes = slices.abs()
    smallest = torch.finfo(product.dtype).tiny
    if (product.isfinite() & ((product.abs() >= smallest) | (magnitudes == 0).any(0))).all():
        return product
    return slices.sign().prod(0) * magnitudes.log().mean(0).exp()


# ``first`` is the root of the group (q_proj, gate_proj, or one projection that holds both), ``last`` what it ends in.
AGGREGATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda slices: slices.sum(0),
    "mean": lambda slices: slices.mean(0),
    "max": lambda slices: slices.amax(0),
    "prod": _product,
    "first": lambda slices: slices[0],
    "last": lambda slices: slices[-1],
}


def scored_dims(unit: Unit, ranks: Mapping[str, int]) -> list[tuple[str, int]]:
    """Return the parameter dims to score: all but the biases of weights that are scored too, as in LLM-Pruner."""
    dims = [(name, dim) for name, dim in unit.dims if name in ranks]  # buffers have no gradient
    owners = {name.rpartition(".")[0] for name, _ in dims if ranks[name] > 1}
    return [(name, dim) for name, dim in dims if ranks[name] > 1 or name.rpartition(".")[0] not in owners]


def dims_to_score(units: Iterable[Unit], ranks: Mapping[str, int]) -> Dims:
    """Return the dims of every parameter that need numbers per channel to score these units."""
    dims: dict[str, list[int]] = {}
    for unit in units:
        for name, dim in scored_dims(unit, ranks):
            if dim not in dims.setdefault(name, []):
                dims[name].append(dim)
    return dims


def aggregate(unit: Unit, salience: Salience, ranks: Mapping[str, int], aggregation: str) -> torch.Tensor:
    """Return scores ``[unit.size]`` from the numbers per channel of the unit's dims; dims without numbers are skipped.

    If dims have different numbers of channels per index (a key-value group has more query than key channels), the query
    heads of a group are summed, channel by channel.
    """
    keys = [key for key in scored_dims(unit, ranks) if key in salience]
    if unit.kind == "layers":  # every dim belongs to one index: there is nothing to aggregate over
        scores = torch.zeros(unit.size, dtype=torch.float64)
        for key in keys:
            scores.index_add_(0, unit.dims[key], salience[key].double())
        return scores
    slices = [salience[key].double()[unit.positions(*key)] for key in keys]
    width = min(s.shape[1] for s in slices)
    if any(s.shape[1] % width for s in slices):
        width = 1
    folded = torch.stack([s.view(unit.size, -1, width).sum(1) for s in slices])
    return AGGREGATIONS[aggregation](folded).sum(-1)


def reduce_to(dim: int, value: torch.Tensor) -> torch.Tensor:
    """Sum a weight-shaped tensor over all dims but one: ``[size of that dim]``."""
    others = [d for d in range(value.ndim) if d != dim]
    return value.sum(others) if others else value

"""Criteria of the weights alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .aggregate import reduce_to


@torch.no_grad()
def magnitude(
    tensors: Iterable[tuple[str, torch.Tensor]], dims: dict[str, list[int]], power: int
) -> dict[tuple[str, int], torch.Tensor]:
    """Return the L1 or L2 importance of every channel: sum |w|^p over its slice, without the root, as in LLM-Pruner.

    Args:
        tensors: pairs of parameter name and weight, read one after the other.
        dims: dims of each parameter to score.
        power: p, 1 or 2.

    Returns ``{(parameter, dim): [size of dim]}`` in fp32.
    """
    salience = {}
    for name, tensor in tensors:
        if name in dims:
            weight = tensor.detach().float()
            value = weight.abs() if power == 1 else weight.square()
            for dim in dims[name]:
                salience[name, dim] = reduce_to(dim, value).cpu()
    return salience

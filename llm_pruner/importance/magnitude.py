"""Criteria that look at the weights alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .aggregate import reduce_to


@torch.no_grad()
def magnitude(
    tensors: Iterable[tuple[str, torch.Tensor]], slices: dict[str, list[int]], power: int
) -> dict[tuple[str, int], torch.Tensor]:
    """L1 or L2 importance of every channel: sum |w|^p over the slice, without the root (LLM-Pruner).

    Args:
        tensors: the weights by name, one after the other.

    Returns ``{(parameter, dim): [size of the dim]}`` in fp32.
    """
    out = {}
    for name, tensor in tensors:
        if name in slices:
            weight = tensor.detach().float()
            value = weight.abs() if power == 1 else weight.square()
            for dim in slices[name]:
                out[name, dim] = reduce_to(dim, value).cpu()
    return out

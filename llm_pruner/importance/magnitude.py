"""Criteria that look at the weights alone."""

from __future__ import annotations

import torch
from torch import nn

from ..graph import sources
from .aggregate import reduce_to


@torch.no_grad()
def magnitude(model: nn.Module, slices: dict[str, list[int]], power: int) -> dict[tuple[str, int], torch.Tensor]:
    """L1 or L2 importance of every channel: sum |w|^p over the slice, without the root (LLM-Pruner).

    Returns ``{(parameter, dim): [size of the dim]}`` in fp32.
    """
    tensors = sources(model)
    out = {}
    for name, dims in slices.items():
        weight = tensors[name].detach().float()
        value = weight.abs() if power == 1 else weight.square()
        for dim in dims:
            out[name, dim] = reduce_to(dim, value).cpu()
    return out

"""Find the tensors of a router among those that run through its experts."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .units import Unit


def router_slices(unit: Unit, experts: Iterable[int]) -> dict[str, dict[int, torch.Tensor]]:
    """Return the positions of experts in the tensors that have one row or number per expert, such as a router's."""
    single = {name for (name, _), label in unit.dims.items() if int((label >= 0).sum()) == unit.size}
    return {name: positions for name, positions in unit.slices(experts).items() if name in single}

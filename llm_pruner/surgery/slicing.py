"""Cut tensors by a plan: names and tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import PrunerError
from ..selection.plan import PruningPlan


def cut(name: str, tensor: torch.Tensor, plan: PruningPlan) -> torch.Tensor:
    """Return the kept part of a tensor, always a copy."""
    kept = plan.kept.get(name, {})
    if not kept:
        return tensor.clone()
    for dim, positions in kept.items():
        tensor = tensor.index_select(dim, positions.to(tensor.device))
    return tensor.contiguous()


def mask(name: str, tensor: torch.Tensor, plan: PruningPlan) -> torch.Tensor:
    """Return a copy of the tensor, at its full shape, with zeros where the plan removes."""
    masked = tensor.clone()
    for dim, positions in plan.kept.get(name, {}).items():
        is_removed = torch.ones(tensor.shape[dim], dtype=torch.bool)
        is_removed[positions] = False
        masked.index_fill_(dim, is_removed.nonzero().flatten().to(tensor.device), 0)
    return masked


def check_fits(shapes: Mapping[str, tuple[int, ...]], plan: PruningPlan) -> None:
    """Refuse a plan that was made for another model.

    Raises:
        PrunerError: a shape differs or a parameter is missing; the message names it.
    """
    for name, shape in plan.shapes.items():
        actual = shapes.get(name)
        if actual is None or tuple(actual) != tuple(shape):
            raise PrunerError(
                f"the plan was made for another model: {name} is {list(shape)} in the plan, "
                f"{'absent' if actual is None else list(actual)} in the model"
            )

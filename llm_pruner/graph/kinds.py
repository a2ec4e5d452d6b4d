"""Derive the kind of a unit from the operators that its axis met."""

from __future__ import annotations

import torch
from torch import nn

from .axes import Atom

Occurrence = tuple[Atom, dict[tuple[str, int], torch.Tensor]]
FIXED = "torch's attention has no size of heads apart from its width"


def fixed_heads(model: nn.Module) -> set[str]:
    """Return the parameters of torch's attention, whose heads are as large as its width over their number."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        for name, _ in module.named_parameters()
    }


def kind_of(atom: Atom, dims: dict, layers: set[tuple[str, int] | None], occurrences: list[Occurrence]) -> str:
    """Return the kind of a leaf.

    Args:
        dims: parameter dims that the leaf runs through.
        layers: stacks and layers that hold it, None for parameters outside of layers.
        occurrences: every leaf of the model, with the parameter dims that it runs through.
    """
    tags = atom.tags
    if "vocabulary" in tags:
        return "vocabulary"
    if "hidden" in tags or ((len(layers) > 1 or None in layers) and "mixing" not in tags):
        return "hidden"
    if "indexed" in tags:
        return "experts"
    if "attention" in tags and "scale" not in atom.flags:  # heads are never summed over where tokens meet
        return "query_heads" if _is_group_member(atom, dims, occurrences) else "heads"
    if "activation" in tags and "mixing" not in tags and len(dims) > 1:
        return "neurons"
    # The residual stream of a model that begins with a convolution spans layers, though its channels were mixed.
    return "hidden" if len(layers - {None}) > 1 else "channels"


def _is_group_member(atom: Atom, dims: dict, occurrences: list[Occurrence]) -> bool:
    """Return True for query heads of a group: the key-value heads occur wherever they do, and also elsewhere."""
    return any(
        other is not atom
        and "attention" in other.tags
        and dims.keys() <= other_dims.keys()
        and all(bool((other_dims[key][label >= 0] >= 0).all()) for key, label in dims.items())
        and sum(int((v >= 0).sum()) for v in other_dims.values()) > sum(int((v >= 0).sum()) for v in dims.values())
        for other, other_dims in occurrences
    )

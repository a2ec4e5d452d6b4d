"""Derive the kind of a unit from the operators that its axis met."""

from __future__ import annotations

import torch

from .axes import Atom

Occurrence = tuple[Atom, dict[tuple[str, int], torch.Tensor]]


def kind_of(atom: Atom, where: dict, layers: set[tuple[str, int] | None], occurrences: list[Occurrence]) -> str:
    """Return the kind of a leaf.

    Args:
        where: parameter dims that the leaf runs through.
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
        return "query_heads" if _is_group_member(atom, where, occurrences) else "heads"
    if "activation" in tags and "mixing" not in tags and len(where) > 1:
        return "neurons"
    # The residual stream of a model that begins with a convolution spans layers, though its channels were mixed.
    return "hidden" if len(layers - {None}) > 1 else "channels"


def _is_group_member(atom: Atom, where: dict, occurrences: list[Occurrence]) -> bool:
    """Return True for query heads of a group: wherever they occur, another axis of heads occurs too, and that axis
    also elsewhere."""
    return any(
        other is not atom
        and "attention" in other.tags
        and where.keys() <= theirs.keys()
        and all(bool((theirs[key][label >= 0] >= 0).all()) for key, label in where.items())
        and sum(int((v >= 0).sum()) for v in theirs.values()) > sum(int((v >= 0).sum()) for v in where.values())
        for other, theirs in occurrences
    )

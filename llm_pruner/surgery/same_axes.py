"""Compare the axes of a rebuilt model with those that a plan leaves."""

from __future__ import annotations

from collections import defaultdict

import torch
from transformers import PreTrainedModel

from ..graph.units import CouplingGraph, trace
from ..selection.plan import PruningPlan, name_after


def find_wrong_axis(rebuilt: PreTrainedModel, original: CouplingGraph, plan: PruningPlan) -> str:
    """Return the first axis of a rebuilt model that differs from the plan, "" if none does.

    Shapes can agree while head counts differ.
    """
    expected = _axes(original, plan)
    for key, sizes in _axes(trace(rebuilt), PruningPlan()).items():
        if sizes != expected[key]:
            return (
                f"{key[0]} has axes {sizes} (size, stride, whether of heads) in dim {key[1]} of the rebuilt model, "
                f"not {expected[key]}"
            )
    return ""


def _axes(graph: CouplingGraph, plan: PruningPlan) -> dict[tuple[str, int], list[tuple[int, int, bool]]]:
    """Return the axes that every parameter dim is made of after the plan: size, stride and whether the indices are
    heads.

    The stride tells three heads of four channels from four heads of three; that they are heads, one of four channels
    from four of one.
    """
    axes: dict[tuple[str, int], list[tuple[int, int, bool]]] = defaultdict(list)
    strides: dict[tuple[int, int], int] = {}  # by label and what of it is kept, which many dims share
    for unit in [*graph.units, *graph.frozen]:
        if unit.kind == "layers":
            continue
        size = plan.units[unit.name].kept.numel() if unit.name in plan.units else unit.size
        for (name, dim), label in unit.dims.items():
            new = name_after(name, plan)
            if new is None or size == 1:  # an axis of one index is no axis any more
                continue
            kept = plan.kept.get(name, {}).get(dim)
            key = id(label), id(kept)
            if key not in strides:
                strides[key] = _stride(label if kept is None else label[kept])
            axes[new, dim].append((size, strides[key], unit.kind in ("heads", "query_heads")))
    return defaultdict(list, {key: sorted(in_dim) for key, in_dim in axes.items()})


def _stride(label: torch.Tensor) -> int:
    """Return how many positions the first index has, from the first position on."""
    if not len(label) or label[0] < 0:
        return 0
    others = (label != label[0]).nonzero()
    return int(others[0]) if len(others) else len(label)

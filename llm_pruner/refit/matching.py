"""Match the layers of a pruned model with those of the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import PrunerError
from ..models.per_layer import layer_lists
from ..selection.plan import PruningPlan

KeptLayers = Sequence[int] | Mapping[str, Sequence[int]]  # indices of layers, or these by the path of their stack


@dataclass(frozen=True)
class MatchingStack:
    """A stack of layers in both models.

    Attributes:
        path: path of the stack.
        theirs: layers of the original.
        ours: layers of the pruned model.
        kept: index of each of ours in the original.
        plan: plan of the pruned model, None if it lost nothing but widths inside layers.
    """

    path: str
    theirs: nn.ModuleList
    ours: nn.ModuleList
    kept: list[int]
    plan: PruningPlan | None = None

    @property
    def last(self) -> list[int]:
        """Index of the original's layer whose output is the target of each of ours.

        A layer in front of a gap aims at the output of the last dropped one.
        """
        return [following - 1 for following in [*self.kept, len(self.theirs)][1:]]

    def comparable(self, theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor | None:
        """Return the channels of the original's hidden states that ours have, None if these are not known."""
        wide, narrow = theirs.shape[-1], ours.shape[-1]
        if wide == narrow:
            return theirs
        for choice in self.plan.units.values() if self.plan else ():
            if choice.kind == "hidden" and (choice.size, len(choice.kept)) == (wide, narrow):
                return theirs[..., choice.kept.to(theirs.device)]
        return None


def matching_stacks(
    model: PreTrainedModel, pruned: PreTrainedModel, plan: PruningPlan | None = None
) -> list[MatchingStack]:
    """Return the stacks of layers that both models have.

    Raises:
        PrunerError: the models have other stacks, or layers that the plan does not explain.
    """
    theirs, ours = layer_lists(model), layer_lists(pruned)
    if list(theirs) != list(ours):
        raise PrunerError(f"the models have other stacks of layers: {', '.join(theirs)} and {', '.join(ours)}")
    stacks = []
    for path, layers in ours.items():
        kept = plan.layers[path].tolist() if plan and path in plan.layers else list(range(len(theirs[path])))
        if len(kept) != len(layers):
            raise PrunerError(
                f"the pruned model has {len(layers)} layers in {path} and the original {len(theirs[path])}: give plan, "
                "which names the layers that stay"
            )
        stacks.append(MatchingStack(path, theirs[path], layers, kept, plan))
    return stacks


def cut_stacks(model: PreTrainedModel, pruned: PreTrainedModel, kept: KeptLayers | None) -> list[MatchingStack]:
    """Return the stacks of layers that lost something; of a model with one stack that one.

    Args:
        kept: indices of the original's layers that stay, in order (default: all), of stacks that lost layers; by the
            path of the stack where several did.

    Raises:
        PrunerError: the models have other stacks, or ``kept`` does not fit.
    """
    theirs, ours = layer_lists(model), layer_lists(pruned)
    if not ours or list(theirs) != list(ours):
        raise PrunerError(f"the models have other stacks of layers: {', '.join(theirs)} and {', '.join(ours)}")
    stacks = []
    for path, layers in ours.items():
        count = len(theirs[path])
        stays = kept.get(path) if isinstance(kept, Mapping) else kept
        indices = list(range(count)) if stays is None or (len(ours) > 1 and len(layers) == count) else list(stays)
        if len(indices) != len(layers) or indices != sorted(set(indices)) or not {*indices} <= {*range(count)}:
            raise PrunerError(
                "the pruned model has other layers than the original: give kept, the indices of its layers"
            )
        if len(ours) == 1 or _shapes(layers) != _shapes(theirs[path]):
            stacks.append(MatchingStack(path, theirs[path], layers, indices))
    return stacks


def _shapes(layers: nn.ModuleList) -> list[torch.Size]:
    return [parameter.shape for parameter in layers.parameters()]

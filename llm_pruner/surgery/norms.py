"""What norms would say if channels were gone, asked of the model in which they are only zero.

Zeroing a hidden channel is not removing it: a mean over 576 channels of which 76 are zero is another mean than one over
500. While this mode is active, operators that average over the hidden axis see the kept channels only, so that the
masked model says what the pruned one must say.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..graph import CouplingGraph
from ..selection import PruningPlan

AVERAGES = ("mean", "var", "std", "var_mean")
NORMS = {"native_layer_norm": 1, "_fused_rms_norm": 1}  # where normalized_shape is


class KeptNorms(TorchDispatchMode):
    """Averages and norms over the last dim leave out the ``removed`` positions, where these are all the same.

    The dim may hold the hidden axis several times over, as that of several residual streams does.
    """

    def __init__(self, kept: torch.Tensor, size: int):
        super().__init__()
        gone = torch.ones(size, dtype=torch.bool)
        gone[kept] = False
        self.kept, self.removed, self.size = kept, gone.nonzero().flatten(), size

    def concerns(self, x: Any) -> bool:
        return isinstance(x, torch.Tensor) and x.ndim > 0 and x.shape[-1] % self.size == 0 and x.is_floating_point()

    def pick(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.size)).index_select(-1, positions.to(x.device)).flatten(-2)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if not (name in AVERAGES or name in NORMS) or not self.concerns(args[0]):
            return func(*args, **kwargs)
        x = args[0]
        gone = self.pick(x, self.removed)
        if (gone != gone[..., :1]).any():  # zero, or what is left of zero when a mean has been taken from it
            return func(*args, **kwargs)
        args = [self.pick(a, self.kept) if self.concerns(a) else a for a in args]
        if name in AVERAGES:
            over = args[1] if len(args) > 1 else kwargs.get("dim")
            last = isinstance(over, (list, tuple)) and [d % x.ndim for d in over] == [x.ndim - 1]
            return func(*args, **kwargs) if last else func(x, *args[1:], **kwargs)
        args[NORMS[name]] = [args[0].shape[-1]]
        out, *statistics = func(*args, **kwargs)
        whole = torch.zeros_like(x, dtype=out.dtype).unflatten(-1, (-1, self.size))
        whole.index_copy_(-1, self.kept.to(x.device), out.unflatten(-1, (-1, len(self.kept))))
        return (whole.flatten(-2), *statistics)


def kept_norms(graph: CouplingGraph, plan: PruningPlan) -> list[KeptNorms]:
    """The modes that a plan needs: one for every hidden unit that it cuts."""
    modes = []
    for unit in graph.of_kind("hidden"):
        if unit.name in plan.units:
            (name, dim), label = next((key, label) for key, label in unit.dims.items() if int((label >= 0).all()))
            modes.append(KeptNorms(plan.kept[name][dim], len(label)))
    return modes

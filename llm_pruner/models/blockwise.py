"""Run a model block by block, with converted weights of one block at a time.

A model's weights may need upcasting, lie on another device, or be memory-mapped from files larger than memory. Other
tensors stand in for them: for a block (a decoder layer with weights of its own) only while the block runs, for the rest
(embeddings and head) as long as the context lasts. Afterwards the model has its own tensors again.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import PrunerError
from .hooks import Forward, replaced_forwards
from .per_layer import layer_lists
from .torch_internals import tree_leaves, tree_map

StandIn = Callable[[str, torch.Tensor], torch.Tensor]  # name and tensor -> what takes its place
NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Compute:
    """The device and dtype that a model computes with; its weights are converted a block at a time."""

    device: torch.device
    dtype: torch.dtype
    spread: bool = False  # over several devices: what lies on an accelerator is computed there

    def on(self, device: torch.device) -> Compute:
        """Return the settings for another device: in float32 on a CPU, else in bfloat16."""
        same = device.type == self.device.type and None in (device.index, self.device.index)  # cuda is cuda:0
        if same or device == self.device or (self.spread and device.type == self.device.type):
            return self
        return Compute(device, torch.bfloat16 if device.type != "cpu" else torch.float32)

    def convert(self, tensor: torch.Tensor) -> torch.Tensor:
        device = tensor.device if self.spread and tensor.device.type != "cpu" else self.device
        return tensor.detach().to(device, self.dtype if tensor.dtype in NARROW else tensor.dtype)


def native_compute(model: nn.Module) -> Compute:
    """Return a model's own device and dtype; float32 for 16-bit weights on a CPU, which is slow in 16 bits.

    Raises:
        PrunerError: some weights are offloaded by hooks, as accelerate's are.
    """
    first = next(model.parameters())
    devices = list(dict.fromkeys(p.device for p in model.parameters()))
    if len(devices) > 1:
        if any(device.type == "meta" for device in devices):
            raise PrunerError(
                "some weights of the model are offloaded: load it with llm_pruner.load(..., device_map='auto'), which "
                "brings layers in one at a time"
            )
        main = next(device for device in devices if device.type != "cpu")
        return Compute(main, first.dtype, spread=True)
    narrow_cpu = first.device.type == "cpu" and first.dtype in NARROW
    return Compute(first.device, torch.float32 if narrow_cpu else first.dtype)


class StandIns:
    """Tensors that stand in for a model's own, block by block.

    Attributes:
        blocks: the decoder layers that share no tensor with another module, by path.
    """

    def __init__(self, model: nn.Module, stand_in: StandIn):
        self.stand_in = stand_in
        names = {id(t): n for n, t in [*model.named_parameters(), *model.named_buffers()]}
        slots: dict[str, list[tuple[dict[str, Any], str, str]]] = {}
        self.blocks = {f"{path}.{i}": m for path, stack in layer_lists(model).items() for i, m in enumerate(stack)}
        owner = {id(sub): path for path, block in self.blocks.items() for sub in block.modules()}
        seen: dict[str, set[str]] = {}  # which blocks a tensor is met in
        for module in model.modules():
            path = owner.get(id(module), "")
            for holder in (module._parameters, module._buffers):
                for key, tensor in holder.items():
                    if tensor is not None:
                        slots.setdefault(path, []).append((holder, key, names[id(tensor)]))  # type: ignore[arg-type]
                        seen.setdefault(names[id(tensor)], set()).add(path)
        times = Counter(id(block) for block in self.blocks.values())
        shared = {p for paths in seen.values() if len(paths) > 1 for p in paths}
        self.blocks = {p: b for p, b in self.blocks.items() if p not in shared and times[id(b)] == 1}
        self._slots = {path: slots.get(path, []) for path in self.blocks}
        self._slots[""] = [slot for path, found in slots.items() if path not in self.blocks for slot in found]

    def names(self, path: str = "") -> set[str]:
        """Return the names of a block's tensors, or of the rest's."""
        return {name for _, _, name in self._slots[path]}

    @contextmanager
    def placed(self, path: str = "") -> Iterator[dict[str, torch.Tensor]]:
        """Put stand-ins in the places of a block's tensors, or of the rest's, and yield the stand-ins by name."""
        saved = [(holder, key, holder[key]) for holder, key, _ in self._slots[path]]
        tensors: dict[str, torch.Tensor] = {}
        try:
            for holder, key, name in self._slots[path]:
                if name not in tensors:
                    tensors[name] = self.stand_in(name, holder[key])
                holder[key] = tensors[name]
            yield tensors
        finally:
            for holder, key, tensor in saved:
                holder[key] = tensor

    def _on_own_device(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Run a block on its stand-ins' device; move inputs there and outputs back."""

        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            came_from = next((t.device for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)), None)
            holder, key, _ = self._slots[path][0]
            home = holder[key].device
            if came_from in (home, None):
                return forward(*args, **kwargs)
            args, kwargs = tree_map(lambda v: v.to(home) if isinstance(v, torch.Tensor) else v, (args, kwargs))
            return tree_map(lambda v: v.to(came_from) if isinstance(v, torch.Tensor) else v, forward(*args, **kwargs))

        return run

    @contextmanager
    def forwards(self, wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
        """Run ``wrap(path, forward)`` instead of every block's ``forward``."""
        paths = list(self.blocks)

        def replace(index: int, forward: Forward) -> Forward:
            return wrap(paths[index], self._on_own_device(paths[index], forward))

        with replaced_forwards(list(self.blocks.values()), replace):
            yield


@contextmanager
def standing_in(model: nn.Module, stand_in: StandIn) -> Iterator[None]:
    """Run a model with stand-ins in the places of its tensors, one block's at a time."""
    stand_ins = StandIns(model, stand_in)

    def wrap(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            with stand_ins.placed(path):
                return forward(*args, **kwargs)

        return run

    with stand_ins.placed(), stand_ins.forwards(wrap):
        yield


@contextmanager
def computing(model: nn.Module, compute: Compute | None = None) -> Iterator[Compute]:
    """Run a model with the device and dtype of ``compute`` (default: :func:`native_compute`); yield these."""
    compute = compute or native_compute(model)
    first = next(model.parameters())
    if (
        not compute.spread
        and first.device == compute.device
        and (first.dtype not in NARROW or first.dtype == compute.dtype)
    ):
        yield compute
        return
    with standing_in(model, lambda _, tensor: compute.convert(tensor)):
        yield compute

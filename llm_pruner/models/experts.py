"""Watch the experts of a mixture at work, and keep a router from choosing some of them.

A mixture of experts in transformers has a module that owns the stacked weights of all its experts. It is called either
with hidden states ``[tokens, hidden]``, the indices of each token's experts ``[tokens, k]`` and their gates ``[tokens,
k]`` (the contract of ``use_experts_implementation``), or with what every expert reads, ``[experts x tokens, hidden]``,
gated and zero for tokens that are routed elsewhere (Llama 4). Both are told by the arguments, not by the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from ..errors import PrunerError
from .hooks import Forward, replaced_forwards

TOKENS_PER_CALL = 4096  # tokens whose experts' outputs are in memory at once
CASTS = (torch.Tensor.to, torch.Tensor.type, torch.Tensor.float, torch.Tensor.double, torch.Tensor.type_as)
PRODUCTS = (linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm)


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Output of the experts of one module: an entry per token and expert that it is routed to.

    Attributes:
        tokens: number of tokens that the module read.
        token: index of the token in the call, LongTensor ``[entries]``.
        expert: index of the expert, LongTensor ``[entries]``.
        gate: factor of the expert's output in the sum, ``[entries]``; 1 where the model scales what experts read.
        output: the expert's output ``[entries, hidden]``, before its gate.
    """

    tokens: int
    token: torch.Tensor
    expert: torch.Tensor
    gate: torch.Tensor
    output: torch.Tensor


Visit = Callable[[str, Routing], None]
TopKCall = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # hidden states, experts and gates of tokens


@contextmanager
def watching(model: nn.Module, experts: dict[str, int], visit: Visit) -> Iterator[None]:
    """Call ``visit(path, routing)`` for what modules of experts compute, in chunks of tokens.

    The model's output stays the same but for the order in which a token's experts are summed. Every expert computes
    each of its tokens once, as without the watch.

    Args:
        experts: number of experts by the path of the module that owns their stacked weights.

    Raises:
        PrunerError: when the model runs, if a module is called with other arguments than the two kinds above.
    """
    paths = list(experts)

    def watch(index: int, forward: Forward) -> Forward:
        return _watched(paths[index], forward, experts[paths[index]], visit)

    with replaced_forwards([model.get_submodule(path) for path in paths], watch):
        yield


def _watched(path: str, forward: Callable[..., Any], experts: int, visit: Visit) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if (call := top_k_call(args, kwargs)) is not None:
            return _of_top_k(path, forward, experts, visit, call)
        if (inputs := gated_inputs(args, kwargs, experts)) is not None:
            return _of_gated_inputs(path, forward, visit, inputs)
        shapes = ", ".join(str(list(t.shape)) for t in _tensors(args, kwargs))
        called = f"the experts of {path} are called with tensors {shapes}: not known how they are routed"
        raise PrunerError(f"{called}: use taylor, l2 or random")

    return run


def top_k_call(args: Any, kwargs: Mapping[str, Any]) -> TopKCall | None:
    """Return hidden states, experts and gates among the arguments of a module of experts, None for another call."""
    tensors = _tensors(args, kwargs)
    indices, floats = ([t for t in tensors if t.is_floating_point() == floating] for floating in (False, True))
    if not indices or indices[0].ndim != 2 or len(floats) != 2 or floats[1].shape != indices[0].shape:
        return None
    return floats[0], indices[0], floats[1]


def gated_inputs(args: Any, kwargs: Mapping[str, Any], experts: int) -> torch.Tensor | None:
    """Return what every expert reads among the arguments of a module of experts, None for another call.

    Returns:
        ``[experts, tokens, hidden]``, zero for tokens that are routed elsewhere.
    """
    tensors = _tensors(args, kwargs)
    if len(tensors) != 1 or not tensors[0].is_floating_point() or tensors[0].ndim != 2 or len(tensors[0]) % experts:
        return None
    return tensors[0].view(experts, -1, tensors[0].shape[-1])


def _tensors(args: Any, kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]


def _of_top_k(path: str, forward: Callable[..., Any], experts: int, visit: Visit, call: TopKCall) -> torch.Tensor:
    """Run experts one per token, each with a gate of 1, and sum their outputs as the module would."""
    hidden, index, gates = call
    sums = []
    rows = hidden.reshape(-1, hidden.shape[-1])
    for start in range(0, len(rows), TOKENS_PER_CALL):
        part = slice(start, start + TOKENS_PER_CALL)
        (tokens, k), chosen, gate = index[part].shape, index[part].reshape(-1, 1), gates[part].reshape(-1, 1)
        output = one_each(forward, rows[part].repeat_interleave(k, 0), chosen, torch.ones_like(gate))
        token = torch.arange(tokens, device=index.device).repeat_interleave(k) + start
        entries = {"token": token, "expert": chosen[:, 0], "gate": gate[:, 0], "output": output}
        if int(chosen.max()) >= experts:  # experts without weights follow those that have some
            entries = {name: values[chosen[:, 0] < experts] for name, values in entries.items()}
        visit(path, Routing(tokens=tokens, **entries))
        sums.append((output * gate).view(tokens, k, -1).sum(1))
    return torch.cat(sums).to(hidden.dtype).view_as(hidden)


def one_each(
    forward: Callable[..., Any], rows: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor
) -> torch.Tensor:
    """Return the output of one expert per row."""
    try:
        output = forward(rows, chosen, gates)
    except ValueError:  # LongCat-Flash squeezes a single choice away: make the same one again, with a gate of 0
        output = forward(rows, chosen.expand(-1, 2), torch.cat([gates, 0 * gates], 1))
    return output.reshape(len(rows), -1)


def _of_gated_inputs(path: str, forward: Callable[..., Any], visit: Visit, inputs: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = forward(inputs.flatten(0, 1))
    expert, token = inputs.any(-1).nonzero(as_tuple=True)
    chosen = output.view(*inputs.shape[:2], -1)[expert, token]
    gate = torch.ones_like(chosen[:, 0])
    visit(path, Routing(tokens=inputs.shape[1], token=token, expert=expert, gate=gate, output=chosen))
    return output


class Unrouted(TorchFunctionMode):
    """A mode in which routers do not choose some experts: their logits are minus infinity.

    That is what removing the experts comes to: the softmax, the sigmoid and the choice of the largest run over the
    others alone. Of the tensors that hold one number per expert, biases that are added to the routers' scores have to
    be minus infinity too; :meth:`stand_in` returns them so.

    Args:
        removed: positions of the removed experts, ``{tensor name: {dim: LongTensor}}``, in all tensors that have them.
    """

    def __init__(self, removed: Mapping[str, Mapping[int, torch.Tensor]]):
        super().__init__()
        self.removed = removed
        self._weights: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}

    def stand_in(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return what takes a tensor's place: itself, or a copy with minus infinity for removed experts."""
        for dim, positions in self.removed.get(name, {}).items():
            if tensor.numel() == tensor.shape[dim]:
                return tensor.index_fill(dim, positions.to(tensor.device), -torch.inf)
            if tensor.ndim == 2 and dim == 0:
                return self._register(tensor, positions)
        return tensor

    def _register(self, tensor: torch.Tensor, removed: torch.Tensor) -> torch.Tensor:
        self._weights[tensor.untyped_storage().data_ptr()] = weakref.ref(tensor), removed
        return tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in CASTS and (known := self._known(args[0])) is not None:
            return self._register(out, known)
        if func in PRODUCTS:
            weight = args[1] if len(args) > 1 else kwargs.get("weight", kwargs.get("other"))
            known = self._known(weight)
            if known is not None and out.shape[-1] == weight.shape[0 if func is linear else -1]:
                return out.index_fill(-1, known.to(out.device), -torch.inf)
        return out

    def _known(self, tensor: Any) -> torch.Tensor | None:
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta or tensor.ndim != 2:
            return None
        reference, removed = self._weights.get(tensor.untyped_storage().data_ptr(), (lambda: None, None))
        return removed if reference() is not None else None

"""Criteria of experts: forward passes that watch which experts tokens are routed to, and what these compute.

With X_j the calibration tokens that are routed to expert j of a layer, g_j(x) its gate as the model normalises it and
f_j(x) its output, an expert is worth

    frequency       |X_j| / |X|
    ean             sum over X_j of ||f_j(x)||_2                  (EAN: REAP, arXiv 2510.13999, section 4)
    reap            mean over X_j of g_j(x) ||f_j(x)||_2          (REAP, the same, equation 9)
    mone            |X_j| / |X| times || std over X_j of f_j(x) ||_2   (MoNE, arXiv 2507.00390, section 3.2)
    expert_loss     sum over X_j of ||y(x) - y_j(x)||^2 / |X|     (one expert at a time; Lu et al., arXiv 2402.14800,
                                                                   section 3.2, enumerates sets)
    expert_cosine   sum over X_j of 1 - cos(y(x), y_j(x)), / |X|

where y is the output of the layer's block of experts and y_j its output when expert j is gone and tokens are routed
anew. The standard deviation is per channel, from n - 1. Where a model scales what experts read instead of what they
return (Llama 4), f_j is their output as it is and g_j is 1. An expert that no token is routed to is worth 0.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.linalg import vector_norm
from torch.nn.functional import cosine_similarity

from ..errors import PrunerError
from ..graph.places import common_path
from ..graph.routers import router_slices
from ..graph.units import Unit
from ..logs import log
from ..models.arithmetic import in_float64
from ..models.experts import Routing, Unrouted, watching
from ..models.hooks import forward_hooks
from ..models.layers import hidden_out
from ..models.per_layer import layer_lists
from .activation import run_through
from .request import Request
from .super_experts import NO_EXPERTS, experts_by_path

OF_ROUTING = ("frequency", "ean", "reap", "mone")
OF_OUTPUT = ("expert_loss", "expert_cosine")


class _Sums:
    """Sums over the tokens that are routed to each expert, float64: ``[experts]``, of outputs ``[experts, hidden]``."""

    def __init__(self, experts: int):
        self.tokens, self.norms, self.gated_norms, self.squares = (torch.zeros(experts).double() for _ in range(4))
        self.read = 0
        self.outputs: torch.Tensor | None = None

    def add(self, routing: Routing, *, moments: bool) -> None:
        expert, norms = routing.expert.cpu(), vector_norm(in_float64(routing.output), dim=-1)
        if not norms.isfinite().all():
            raise PrunerError("an output of an expert is not finite: load the model with --dtype float32 or bfloat16")
        self.read += routing.tokens
        self.tokens.index_add_(0, expert, torch.ones_like(norms).cpu())
        self.norms.index_add_(0, expert, norms.cpu())
        self.gated_norms.index_add_(0, expert, (in_float64(routing.gate) * norms).cpu())
        if not moments:
            return
        self.squares.index_add_(0, expert, norms.square().cpu())
        if self.outputs is None:
            self.outputs = torch.zeros(len(self.tokens), routing.output.shape[-1]).double()
        self.outputs.index_add_(0, expert, routing.output.cpu().double())

    @property
    def deviation(self) -> torch.Tensor:
        """Return the norm of the standard deviation of each expert's output; 0 for fewer than two tokens."""
        assert self.outputs is not None
        variance = (self.squares - self.outputs.square().sum(1) / self.tokens.clamp_min(1)) / (self.tokens - 1)
        return torch.where(self.tokens > 1, variance, 0).clamp_min(0).sqrt()

    def score(self, criterion: str) -> torch.Tensor:
        if criterion == "ean":
            return self.norms
        if criterion == "reap":
            return self.gated_norms / self.tokens.clamp_min(1)
        frequency = self.tokens / max(self.read, 1)
        return frequency if criterion == "frequency" else frequency * self.deviation


def routing_scores(criterion: str, request: Request) -> dict[str, torch.Tensor]:
    """Score experts by ``frequency``, ``ean``, ``reap`` or ``mone``.

    Raises:
        PrunerError: there are no experts, they are not called in a known way, or an output is not finite.
    """
    units = _experts(criterion, request)
    sums = {path: _Sums(unit.size) for path, unit in units.items()}

    def visit(path: str, routing: Routing) -> bool:
        sums[path].add(routing, moments=criterion == "mone")
        return True

    _run(request, units, visit)
    _name_unreached({unit.name: sums[path].tokens for path, unit in units.items()})
    return {unit.name: sums[path].score(criterion) for path, unit in units.items()}


def output_scores(criterion: str, request: Request) -> dict[str, torch.Tensor]:
    """Score experts by ``expert_loss`` or ``expert_cosine``: a layer's block runs once more per expert, on the tokens
    that are routed to it.

    Raises:
        PrunerError: there are no experts, or their router lies outside of their block.
    """
    units = _experts(criterion, request)
    blocks = {path: _Block(request.model, path, unit, criterion) for path, unit in units.items()}

    def visit(path: str, routing: Routing) -> bool:
        return blocks[path].note(routing)

    with forward_hooks([(block.module, block.measure) for block in blocks.values()], with_kwargs=True):
        _run(request, units, visit)
    return {unit.name: blocks[path].total / max(blocks[path].tokens, 1) for path, unit in units.items()}


class _Block:
    """The block of a layer's experts and their router, and what removing each expert changes in its output."""

    def __init__(self, model: nn.Module, path: str, unit: Unit, criterion: str):
        self.path = common_path(unit.parameters)
        self.module, self.unit, self.criterion = model.get_submodule(self.path), unit, criterion
        if any(self.module is layer for layers in layer_lists(model).values() for layer in layers):
            raise PrunerError(f"{criterion}: the router of {path} lies outside of a block with its experts; use reap")
        self.total, self.tokens = torch.zeros(unit.size).double(), 0
        self._routings: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._busy = False

    def note(self, routing: Routing) -> bool:
        """Remember which tokens are routed to which experts; return False for a pass without one of the experts."""
        if not self._busy:
            self._routings.append((routing.token, routing.expert))
            self.tokens += routing.tokens
        return not self._busy

    def measure(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Add what removing each expert changes in the output of a pass of the block."""
        if self._busy:
            return
        (states, *others) = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if others:
            raise PrunerError(f"{self.criterion}: {self.path} reads more than hidden states; use reap")
        rows, results = (t.reshape(-1, t.shape[-1]) for t in (states, hidden_out(output)))
        token, expert = (torch.cat(parts) for parts in zip(*self._routings, strict=True))
        self._routings.clear()
        self._busy = True
        for j in expert.unique().tolist():
            routed = token[expert == j].unique()
            changed = self._without(j, rows[routed].view(*[1] * (states.ndim - 2), len(routed), -1))
            self.total[j] += _change(self.criterion, results[routed], changed.reshape(len(routed), -1))
        self._busy = False

    def _without(self, expert: int, states: torch.Tensor) -> torch.Tensor:
        """Return the block's output when its router does not choose an expert."""
        tensors = dict([*self.module.named_parameters(), *self.module.named_buffers()])
        with Unrouted(router_slices(self.unit, [expert])) as mode:
            names = [name.removeprefix(f"{self.path}.") for name in mode.removed]
            replaced = {name: mode.stand_in(f"{self.path}.{name}", tensors[name]) for name in names}
            return hidden_out(functional_call(self.module, replaced, (states,)))


def _change(criterion: str, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    before, after = before.cpu().double(), after.cpu().double()
    if criterion == "expert_cosine":
        return (1 - cosine_similarity(before, after, dim=-1)).sum()
    return (before - after).square().sum()


def _experts(criterion: str, request: Request) -> dict[str, Unit]:
    refusal = f"{criterion} scores experts, {NO_EXPERTS}: choose another criterion"
    return experts_by_path(request.model, request.units, refusal)


def _run(request: Request, units: dict[str, Unit], visit: Callable[[str, Routing], bool]) -> None:
    """Run the calibration set through the model, and visit the outputs of experts; True: of the model's own pass."""
    compute, peaks = request.compute, request.peaks

    def visit_all(path: str, routing: Routing) -> None:
        if visit(path, routing) and peaks is not None:
            peaks.add(path, routing)

    sizes = {path: unit.size for path, unit in units.items()}
    layers = peaks.watching_layers() if peaks is not None else nullcontext()
    with watching(request.model, sizes, visit_all), layers:
        run_through(request.model, request.tokens, compute, lambda _, tensor: compute.convert(tensor))


def _name_unreached(tokens: dict[str, torch.Tensor]) -> None:
    """Warn of experts that the calibration set does not reach."""
    unreached = {name: (count == 0).nonzero().flatten().tolist() for name, count in tokens.items()}
    unreached = {name: experts for name, experts in unreached.items() if experts}
    if unreached:
        name, experts = next(iter(unreached.items()))
        log.warning(
            "no calibration token is routed to %d experts of %d layers (%s: %s): they score 0 and go first; a larger "
            "or more varied calibration set reaches more",
            sum(map(len, unreached.values())),
            len(unreached),
            name,
            ", ".join(map(str, experts)),
        )

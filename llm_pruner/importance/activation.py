"""Criteria of activations: forward passes only, no gradients.

With X_j the input of channel j of a weight W (tokens as rows), a channel is worth

    activation   mean |X_j|                          (Minitron, arXiv 2407.14679, section 3.1)
    wanda        sum_i |W_ij| * ||X_j||_2            (Wanda, arXiv 2306.11695, equation 1, summed over the output)
    flap         Var(X_j) * ||W_:j||_2^2             (FLAP, arXiv 2312.11983, section 3, its metric WIFV)

Only dims along which a weight *reads* a unit count: the columns of ``down_proj`` for neurons, of ``o_proj`` for heads,
of every projection behind a norm for hidden channels (whose inputs are the outputs of the norms, as in Minitron).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from ..errors import PrunerError
from ..models.arithmetic import in_float64
from ..models.blockwise import Compute, StandIn, native_compute, standing_in
from ..models.inputs import Inputs
from ..models.processes import averaged, count, mean_of, own_share
from ..models.running import evaluating, forward, implementations
from ..progress import track
from .aggregate import reduce_to
from .scores import Dims, Salience

SAMPLES_PER_PASS = 8  # samples in a forward pass
Visit = Callable[[str, int, torch.Tensor], None]


class Readers(TorchFunctionMode):
    """A mode that calls ``visit(parameter, dim, inputs)`` for every product of activations with a registered weight.

    ``dim`` is the dim of the parameter that is summed over and ``inputs`` the activations ``[tokens, size of dim]``.
    The weight may be a view: an expert of a stack, a transposed matrix.
    """

    def __init__(self, visit: Visit):
        super().__init__()
        self.weights: dict[int, tuple[str, weakref.ref[torch.Tensor]]] = {}
        self.visit = visit

    def register(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Recognise a weight as long as it lives; return it."""
        if weight.ndim > 1:
            self.weights[weight.untyped_storage().data_ptr()] = name, weakref.ref(weight)
        return weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is linear:
            self._visit_product(args[0], args[1] if len(args) > 1 else kwargs["weight"], -1)
        elif func is torch.addmm:
            self._visit_product(args[1], args[2], -2)
        elif func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.bmm):
            self._visit_product(args[0], args[1], -2)
        return func(*args, **kwargs)

    def _visit_product(self, inputs: torch.Tensor, weight: torch.Tensor, summed: int) -> None:
        name, reference = self.weights.get(weight.untyped_storage().data_ptr(), ("", lambda: None))
        parameter = reference()
        if parameter is None or weight.ndim < 2:
            return
        size, stride = weight.shape[summed], weight.stride(summed)
        for dim in reversed(range(parameter.ndim)):
            if parameter.shape[dim] == size and parameter.stride(dim) == stride:
                self.visit(name, dim, inputs.detach().reshape(-1, size))
                return


@torch.no_grad()
def run_through(model: nn.Module, calibration: Inputs, compute: Compute, stand_in: StandIn) -> None:
    """Run the calibration set through the model, in eval mode, with stand-ins in the places of its tensors."""
    with evaluating(model), standing_in(model, stand_in):
        for ids in track(calibration.to(compute.device).split(SAMPLES_PER_PASS), "scoring, forward passes"):
            forward(model, ids)


def read(model: nn.Module, calibration: Inputs, visit: Visit, compute: Compute | None = None) -> None:
    """Run the calibration set ``[samples, tokens]`` through the model, in eval mode, and visit what weights read."""
    compute, readers = compute or native_compute(model), Readers(visit)
    # Experts as a loop over views of their weights: that says what each of them reads.
    with implementations(model, experts="eager"), readers:
        run_through(model, calibration, compute, lambda name, tensor: readers.register(name, compute.convert(tensor)))


@dataclass
class Moments:
    """Sums over tokens of a channel's values, their magnitudes and squares: float64 ``[channels]``."""

    tokens: float
    plain: torch.Tensor
    magnitude: torch.Tensor
    square: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        return self.plain / self.tokens

    @property
    def variance(self) -> torch.Tensor:
        return (self.square / self.tokens - self.mean.square()).clamp_min(0)


def moments(
    model: nn.Module, dims: dict[str, list[int]], calibration: Inputs, compute: Compute | None = None
) -> dict[tuple[str, int], Moments]:
    """Return the moments of the inputs that weights read along the dims to score.

    Raises:
        PrunerError: an activation is not finite; the message names the weight that reads it.
    """
    by_dim: dict[tuple[str, int], Moments] = {}

    def add(name: str, dim: int, inputs: torch.Tensor) -> None:
        if dim not in dims.get(name, ()) or not len(inputs):
            return
        x = in_float64(inputs)
        sums = [x.sum(0).cpu(), x.abs().sum(0).cpu(), x.square().sum(0).cpu()]
        if not torch.isfinite(sums[2]).all():
            raise PrunerError(f"an input of {name} is not finite; load the model with --dtype float32 or bfloat16")
        total = by_dim.setdefault((name, dim), Moments(0, *(torch.zeros_like(s) for s in sums)))
        total.tokens += len(x)
        total.plain += sums[0]
        total.magnitude += sums[1]
        total.square += sums[2]

    read(model, own_share(calibration), add, compute)
    if count() > 1:
        _average(model, dims, by_dim)
    return by_dim


def _average(model: nn.Module, dims: dict[str, list[int]], by_dim: dict[tuple[str, int], Moments]) -> None:
    """Average sums over the processes, with 0 where the tokens of this one do not reach a weight."""
    keys, sizes = [(name, dim) for name in dims for dim in dims[name]], dict(model.named_parameters())
    reached = averaged(torch.tensor([float(key in by_dim) for key in keys]))
    for (name, dim), share in zip(keys, reached.tolist(), strict=True):
        if share:
            zeros = [torch.zeros(sizes[name].shape[dim], dtype=torch.float64) for _ in range(3)]
            total = by_dim.setdefault((name, dim), Moments(0, *zeros))
            total.tokens = mean_of(total.tokens)
            for sums in (total.plain, total.magnitude, total.square):
                averaged(sums)


# Importance of channel j from its column w of the weight and the moments of its input x.
FORMULAS: dict[str, Callable[[torch.Tensor, Moments, int], torch.Tensor]] = {
    "activation": lambda w, x, dim: x.magnitude / x.tokens,
    "wanda": lambda w, x, dim: reduce_to(dim, w.abs()) * x.square.sqrt(),
    "flap": lambda w, x, dim: x.variance * reduce_to(dim, w.square()),
}


def activation(
    model: nn.Module, dims: Dims, calibration: Inputs, criterion: str, *, compute: Compute | None = None
) -> Salience:
    """Return ``activation``, ``wanda`` or ``flap`` of every channel read: ``{(parameter, dim): [size of dim]}``.

    Raises:
        PrunerError: an activation is not finite.
    """
    weights = dict(model.named_parameters())
    return {
        (name, dim): FORMULAS[criterion](weights[name].detach().cpu().double(), inputs, dim)
        for (name, dim), inputs in moments(model, dims, calibration, compute).items()
    }

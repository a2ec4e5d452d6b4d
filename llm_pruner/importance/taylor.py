"""Taylor importance: how much the loss changes when a slice is removed (LLM-Pruner, arXiv 2305.11627, section 3.2).

With W a weight, g the gradient of the mean token loss over the whole calibration set and H the diagonal of the Fisher
information, (1/N) sum_n g_n^2 over N samples taken one at a time, the importance of a slice is

    vectorize      | sum W g |                   (equation 3, first order, the slice as one vector)
    param_first    sum | W g |                   (equation 5, first order, element by element)
    param_second   sum | W H W |
    param_mix      sum | W g - 1/2 W H W |       (equation 5 with its second-order term)

Gradients come block by block (:mod:`llm_pruner.importance.gradients`) and every parameter is reduced to its numbers
per channel before the next block's turn, so they never live all at once. Parameters of no scored unit get none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import PrunerError
from ..models.blockwise import Compute
from ..unfinished import NOTHING_KEPT, Unfinished
from .aggregate import reduce_to
from .gradients import visit_gradients, visit_moments
from .linear_gradients import Moments
from .scores import Dims, Salience

VARIANTS = ("vectorize", "param_first", "param_second", "param_mix")


def taylor(
    model: nn.Module,
    dims: Dims,
    calibration: torch.Tensor,
    variant: str,
    *,
    compute: Compute | None = None,
    unfinished: Unfinished = NOTHING_KEPT,
) -> Salience:
    """Return the Taylor importance of every channel: ``{(parameter, dim): [size of dim]}`` in fp32.

    Args:
        dims: dims of each parameter to score.
        calibration: LongTensor ``[samples, tokens]``.
        variant: one of :data:`VARIANTS`.
        compute: where and how to compute; by default where the model is.
        unfinished: keeps what is done, block by block, for a run that goes on after a stop.

    Raises:
        PrunerError: a gradient is not finite; the message names the parameter.
    """
    results: dict[str, torch.Tensor] = {}  # by parameter and dim

    def add(name: str, value: torch.Tensor, signed: bool = False) -> None:
        for dim in dims[name]:
            channels = reduce_to(dim, value).cpu()
            if not torch.isfinite(channels).all():
                raise PrunerError(
                    f"the gradient of {name} is not finite; load the model with --dtype float32 or bfloat16"
                )
            key = f"{name} {dim}"
            results[key] = results.get(key, 0) + (channels.abs() if signed else channels)

    def first(name: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        value = weight * gradient
        add(name, value if variant == "vectorize" else value.abs_(), signed=variant == "vectorize")

    def second(name: str, weight: torch.Tensor, moments: Moments) -> None:
        curvature = moments.square.mul_(weight).mul_(weight)
        if moments.mean is not None:  # samples are of one length, so the mean of their gradients is g
            curvature = (weight * moments.mean).sub_(curvature, alpha=0.5).abs_()
        add(name, curvature)

    options: Any = {"compute": compute, "unfinished": unfinished, "results": results}
    if variant in ("param_second", "param_mix"):
        visit_moments(model, dims, calibration, second, with_mean=variant == "param_mix", **options)
    else:
        visit_gradients(model, dims, calibration, first, **options)
    pairs = ((key.rpartition(" "), channels) for key, channels in results.items())
    return {(name, int(dim)): channels for (name, _, dim), channels in pairs}

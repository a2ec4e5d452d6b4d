"""Rescale norms after hidden channels are removed, so that their outputs stay the same on average.

A norm divides by the mean square of all channels. Without some channels, this mean changes: if the removed channels
were small, all outputs become smaller. Each norm is multiplied by the factor that brings its output closest to the
original's on the kept channels, by least squares over calibration tokens,

    s = sum_t <n_t, m_t> / sum_t <n_t, n_t>

with m_t the output of the original norm at token t on these channels (without the bias) and n_t the output of the
narrower one for the same input. The factor goes into the norm's weight.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..graph.units import trace
from ..models.arithmetic import in_float64
from ..models.blockwise import computing
from ..models.hooks import forward_hooks
from ..models.inputs import Inputs
from ..models.running import check_calibration, evaluating, forward
from ..progress import track
from ..selection.plan import PruningPlan, name_after

SAMPLES_PER_PASS = 8  # samples in a forward pass


@torch.no_grad()
def rescale_norms(
    model: PreTrainedModel, pruned: PreTrainedModel, plan: PruningPlan, calibration: Inputs
) -> dict[str, float]:
    """Scale the norms of ``pruned`` in place; return their factors by the original's names.

    Args:
        model: the original.
        pruned: the model that ``plan`` leaves of it.
        calibration: LongTensor ``[samples, tokens]``.

    Raises:
        PrunerError: the calibration set is not for this model.
    """
    calibration = check_calibration(model, calibration)
    norms = _narrowed_norms(model, pruned, plan)
    products = {path: NormProducts() for path in norms}

    def measure(path: str, narrow: nn.Module) -> Any:
        kept = plan.kept[f"{path}.weight"][0]

        def hook(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            positions = kept.to(output.device)
            twin = copy.deepcopy(narrow).to(output.device, output.dtype)
            products[path].add(_without_bias(twin, args[0][..., positions]), output[..., positions], twin)

        return hook

    with (
        forward_hooks([(module, measure(path, narrow)) for path, (module, narrow) in norms.items()]),
        evaluating(model),
        computing(model) as compute,
    ):
        for ids in track(calibration.to(compute.device).split(SAMPLES_PER_PASS), "rescaling norms"):
            forward(model, ids)
    factors: dict[str, float] = {}
    for path, (_, narrow) in norms.items():
        factor = products[path].factor
        if factor is not None and _scale(narrow, factor):
            factors[path] = factor
    return factors


def _narrowed_norms(
    model: PreTrainedModel, pruned: PreTrainedModel, plan: PruningPlan
) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Return the norms over hidden channels that the plan cuts, each with its narrower twin, by path."""
    hidden = {key for unit in trace(model).of_kind("hidden") if unit.name in plan.units for key in unit.dims}
    norms = {}
    for path, module in model.named_modules():
        new = name_after(f"{path}.weight", plan)
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 1 and new and (f"{path}.weight", 0) in hidden:
            norms[path] = (module, pruned.get_submodule(new.removesuffix(".weight")))
    return norms


class NormProducts:
    """Sums of <n_t, m_t> and <n_t, n_t> over tokens."""

    def __init__(self) -> None:
        self.cross, self.square = 0.0, 0.0

    def add(self, narrow: torch.Tensor, wide: torch.Tensor, norm: nn.Module) -> None:
        """Add outputs ``[..., channels]`` of the narrow norm (without its bias) and of the wide one."""
        bias = getattr(norm, "bias", None)
        wide = wide if bias is None else wide - bias.to(wide)
        narrow = in_float64(narrow)
        self.cross += (in_float64(wide) * narrow).sum().item()
        self.square += narrow.square().sum().item()

    @property
    def factor(self) -> float | None:
        return self.cross / self.square if self.square > 0 else None


def _without_bias(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    bias = getattr(norm, "bias", None)
    output = norm(x)
    return output if bias is None else output - bias.to(output)


def _scale(norm: nn.Module, factor: float) -> bool:
    """Scale a norm's output, without its bias; return False where its weight does not do that."""
    weight = cast(torch.Tensor, norm.weight)
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    x = x.float() if weight.dtype != torch.float64 else x

    def output_with(candidate: torch.Tensor) -> torch.Tensor:
        twin = copy.deepcopy(norm)
        cast(torch.Tensor, twin.weight).copy_(candidate)
        return _without_bias(twin.to(x.dtype), x)

    target = factor * output_with(weight)
    # Gemma's norms multiply by one more than their weight.
    candidates = [weight.clone(), weight * factor, (weight + 1) * factor - 1]
    errors = [(output_with(candidate) - target).abs().max().item() for candidate in candidates]
    best = max(i for i, error in enumerate(errors) if error == min(errors))
    weight.copy_(candidates[best])
    return best > 0

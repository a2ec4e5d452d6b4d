"""Norms after hidden channels have gone: scaled so that they say, on average, what they said before.

A norm divides by the mean square of all channels. Without some of them that mean is another, and what stays is divided
by it: if the channels that went were small, all that is left becomes smaller. Each norm is given the one factor that
brings its output closest to the original's on the channels that stay, by least squares over calibration tokens,

    s = sum_t <n_t, m_t> / sum_t <n_t, n_t>

with m_t what the original norm says of token t there (without the bias) and n_t what the narrower one says of the same
input. The factor goes into the norm's weight.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..graph.units import trace
from ..models.blockwise import computing
from ..models.running import check_calibration, evaluating, model_inputs
from ..selection.plan import PruningPlan, name_after

SAMPLES_PER_PASS = 8  # samples in a forward pass


@torch.no_grad()
def rescale_norms(
    model: PreTrainedModel, pruned: PreTrainedModel, plan: PruningPlan, calibration: torch.Tensor
) -> dict[str, float]:
    """Scale the norms of ``pruned`` in place; returns their factors by name.

    Args:
        model: the original.
        pruned: what ``plan`` left of it.
        calibration: LongTensor ``[samples, tokens]``.

    Raises:
        PrunerError: the calibration set is not for this model.
    """
    calibration = check_calibration(model, calibration)
    hidden = {key for unit in trace(model).of_kind("hidden") if unit.name in plan.units for key in unit.dims}
    norms = {}
    for path, module in model.named_modules():
        new = name_after(f"{path}.weight", plan)
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 1 and new and (f"{path}.weight", 0) in hidden:
            norms[path] = (module, pruned.get_submodule(new.removesuffix(".weight")))
    sums = {path: [0.0, 0.0] for path in norms}

    def look(path: str, narrow: nn.Module, kept: torch.Tensor) -> Any:
        bias = getattr(narrow, "bias", None)

        def hook(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            positions = kept.to(output.device)
            mine = copy.deepcopy(narrow).to(output.device, output.dtype)
            was, now = output[..., positions], mine(args[0][..., positions])
            if bias is not None:
                was, now = was - bias.to(was), now - bias.to(now)
            sums[path][0] += (was.double() * now.double()).sum().item()
            sums[path][1] += now.double().square().sum().item()

        return hook

    handles = [
        module.register_forward_hook(look(path, narrow, plan.kept[f"{path}.weight"][0]))
        for path, (module, narrow) in norms.items()
    ]
    try:
        with evaluating(model), computing(model) as compute:
            for ids in calibration.to(compute.device).split(SAMPLES_PER_PASS):
                model(**model_inputs(model, ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {
        path: factor
        for path, (_, narrow) in norms.items()
        if sums[path][1] > 0 and _scale(narrow, factor := sums[path][0] / sums[path][1])
    }


def _scale(norm: nn.Module, factor: float) -> bool:
    """Scale what a norm says, without its bias; False where its weight does not do that."""
    weight = cast(torch.Tensor, norm.weight)
    bias = getattr(norm, "bias", None)
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    x = x.float() if weight.dtype != torch.float64 else x
    before = weight.clone()

    def says() -> torch.Tensor:
        out = copy.deepcopy(norm).to(x.dtype)(x)
        return out - bias.to(out) if bias is not None else out

    wanted = factor * says()
    off: dict[float, torch.Tensor] = {(says() - wanted).abs().max().item(): before}
    for scaled in (before * factor, (before + 1) * factor - 1):  # Gemma's norms multiply by one more than their weight
        weight.copy_(scaled)
        off[(says() - wanted).abs().max().item()] = scaled
    best = off[min(off)]
    weight.copy_(best)
    return best is not before

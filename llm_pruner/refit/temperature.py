"""Temperature scaling: one factor on the logits of a pruned model, folded into its weights.

Pruning leaves a model overconfident. Its logits are scaled by the one factor that brings its predictions closest to the
original's (Guo et al., arXiv 1706.04599, section 4.2, with the original's probabilities as labels).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.blockwise import computing, native_compute, standing_in
from ..models.inputs import Inputs
from ..models.per_layer import layer_lists
from ..models.running import evaluating, forward, logits
from ..models.tasks import predicts_tokens
from ..progress import track

TEMPERATURES = [round(0.7 + 0.02 * i, 2) for i in range(21)]


@torch.no_grad()
def scale_logits(model: PreTrainedModel, pruned: PreTrainedModel, ids: Inputs) -> float | None:
    """Scale the pruned model's logits, in its weights, to be closest to the original's.

    Args:
        ids: LongTensor ``[samples, tokens]``.

    Returns:
        The factor, or None if no weight scales all logits, or the model is no language model.
    """
    weights = scaling_weights(pruned, ids[:1]) if predicts_tokens(pruned) else []
    if not weights:
        return None
    losses = torch.zeros(len(TEMPERATURES), dtype=torch.float64)
    with evaluating(model), evaluating(pruned), computing(model) as compute, computing(pruned):
        for row in track(ids.to(compute.device).split(1), "scaling logits"):
            expected, present = (forward(m, row).logits[0, :-1].float() for m in (model, pruned))
            # The cross-entropy against p of logits f z is log sum exp(f z) - f <p, z>.
            agreement = (expected.softmax(-1) * present).sum().cpu().double()
            for i, factor in enumerate(TEMPERATURES):
                losses[i] += (present * factor).logsumexp(-1).sum().cpu().double() - factor * agreement
    best = TEMPERATURES[int(losses.argmin())]
    for weight in weights:
        weight.mul_(best)
    return best


@torch.no_grad()
def scaling_weights(model: PreTrainedModel, ids: Inputs) -> list[nn.Parameter]:
    """Return the parameters that scale all logits when they are scaled: the last norm's, else an untied head's.

    Halves are tried on stand-ins, so that the model's own weights stay whatever happens.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    plain = _logits_with_halves(model, ids, set())
    inside = tuple(f"{path}." for path in layer_lists(model))
    outside = [m for n, m in model.named_modules() if not n.startswith(inside) and not list(m.children())]
    for module in sorted(reversed(outside), key=lambda module: module is model.get_output_embeddings()):
        weights = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        if not weights or any(p is model.get_input_embeddings().weight for p in weights):
            continue
        halved = _logits_with_halves(model, ids, {names[id(p)] for p in weights})
        if torch.allclose(halved, 0.5 * plain, rtol=1e-2, atol=1e-3 * plain.abs().max().item()):
            return weights
    return []


def _logits_with_halves(model: PreTrainedModel, ids: Inputs, names: set[str]) -> torch.Tensor:
    """Return the logits of the model with half of the named parameters."""
    compute = native_compute(model)

    def stand_in(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = compute.convert(tensor)
        return 0.5 * tensor if name in names else tensor

    with evaluating(model), standing_in(model, stand_in):
        return logits(model, ids.to(compute.device))

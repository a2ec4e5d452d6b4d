"""Low-rank training without labels: linear layers learn updates of low rank from the next tokens of a text.

A linear layer W becomes W + B A with A ``[rank, in]`` and B ``[out, rank]`` (LoRA, Hu et al., arXiv 2106.09685, section
4.1, with a scale of 1). W stays as it is, and so do embeddings and head; norms and biases are trained as they are. At
the end B A is added to W: the saved model is plain. The original is not run. Where it has written the text, this is
distillation by sequences (Kim and Rush, arXiv 1606.07947, section 3.2).

Models that do not predict the next token of a text learn the original's output, as in
:mod:`~llm_pruner.refit.distill`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..importance.linear_gradients import linear_layers
from ..models.arithmetic import narrow_arithmetic
from ..models.blockwise import computing, native_compute
from ..models.generate import seeded
from ..models.hooks import forward_hooks
from ..models.inputs import Inputs
from ..models.loss import IGNORED, has_loss
from ..models.per_layer import layer_lists
from ..models.running import evaluating, model_inputs, target_ids, without_cache
from ..unfinished import NOTHING_KEPT, Unfinished
from .budget import Budget
from .distill import Distillation
from .training import TrainingReport, check_memory, frozen, in_float32, train_together

RANK = 64
RATE = 1e-3  # up to 512 hidden channels
EPOCHS = 1.34  # tokens that are read more often are learnt by heart; docs/how-to/refit.md has the measurement


def next_token_loss(model: PreTrainedModel, ids: Inputs) -> torch.Tensor:
    """Return the mean cross entropy of the tokens of a batch that a model predicts."""
    inputs = model_inputs(model, ids)
    logits = model(**inputs, **without_cache(model)).logits[:, :-1]
    targets = target_ids(inputs)[:, 1:].flatten()
    known = targets.where(targets < logits.shape[-1], IGNORED)  # Mllama's head has no image token
    return cross_entropy(logits.flatten(0, 1).float(), known)


def lora(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    calibration: Inputs,
    budget: Budget,
    *,
    seed: int = 0,
    unfinished: Unfinished = NOTHING_KEPT,
) -> TrainingReport:
    """Train low-rank updates of ``pruned`` in place, and its norms and biases.

    Args:
        model: original model, which stays as it is.
        pruned: pruned model, of the same vocabulary.
        calibration: LongTensor ``[samples, tokens]`` or other inputs, a sixteenth of which is held out, at most 16.
        budget: of the training, which also ends after 1.34 epochs of next tokens.
        seed: of the first updates and the order of the samples.
        unfinished: keeps what is done, and has what a run that was stopped had done.

    Returns:
        Tokens, steps and held-out losses. Where the loss did not fall, the weights are as before.

    Raises:
        PrunerError: there are fewer than 16 samples, or the training does not fit in memory.
    """
    compute, layers = native_compute(pruned), _layers(pruned)
    widened = [p for p in pruned.parameters() if p.ndim < 2 or compute.dtype == torch.float32]
    trained = sum(RANK * sum(layer.weight.shape) for layer in layers) + sum(p.numel() for p in widened if p.ndim < 2)
    check_memory(pruned, trained, sum((4 - p.itemsize) * p.numel() for p in widened if p.is_floating_point()))
    with (
        evaluating(model),
        evaluating(pruned),
        frozen(pruned),
        in_float32(widened) as parameters,
        low_rank(layers, seed, compute.device) as updates,
        computing(model),
        narrow_arithmetic(compute.device),
    ):
        for parameter in parameters:
            parameter.requires_grad_(parameter.ndim < 2)
        reads = has_loss(pruned)
        loss = partial(next_token_loss, pruned) if reads else Distillation(model, pruned).loss
        return train_together(
            pruned,
            updates + [p for p in parameters if p.ndim < 2],
            loss,
            calibration,
            budget=budget,
            rate=RATE,
            seed=seed,
            epochs=EPOCHS if reads else None,
            unfinished=unfinished,
        )


@contextmanager
def low_rank(layers: list[Any], seed: int, device: torch.device) -> Iterator[list[nn.Parameter]]:
    """Add low-rank updates to linear layers, of 0 at first; yield their factors, and merge them at the end."""
    with seeded(seed, device):
        factors = [_factors(layer) for layer in layers]

    with forward_hooks([(layer, _add(a, b)) for layer, (a, b) in zip(layers, factors, strict=True)]):
        yield [factor for pair in factors for factor in pair]
    for layer, (a, b) in zip(layers, factors, strict=True):
        update = (b @ a).detach()
        layer.weight.data.add_((update.T if isinstance(layer, Conv1D) else update).to(layer.weight.dtype))


def _add(a: nn.Parameter, b: nn.Parameter) -> Any:
    """Return a hook that adds B A x to what a layer returns for x."""

    def hook(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return output + linear(linear(args[0].to(a.dtype), a), b).to(output.dtype)

    return hook


def _factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Return random A ``[rank, in]`` and B ``[out, rank]`` of 0."""
    outputs, inputs = reversed(layer.weight.shape) if isinstance(layer, Conv1D) else layer.weight.shape
    a = torch.randn(RANK, inputs, device=layer.weight.device) / inputs**0.5
    return nn.Parameter(a), nn.Parameter(torch.zeros(outputs, RANK, device=layer.weight.device))


def _layers(model: PreTrainedModel) -> list[Any]:
    """Return the linear layers of a model's stacks."""
    inside = tuple(f"{path}." for path in layer_lists(model))
    names = {name for name, _ in model.named_parameters() if name.startswith(inside)}
    return [module for module, one in linear_layers(model, names) if one.weight]
